"""From a recipe to the config that jsonargparse sees: classes chosen, slots expanded, every problem collected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl

from distillkit.cli.arguments import BASES, arguments_of, slots
from distillkit.cli.recipe import Recipe, Slots
from distillkit.cli.shortnames import Expansion
from distillkit.errors import did_you_mean
from distillkit.registry import find, import_object, load

__all__ = ["Canonical", "Refused", "canonical", "json_ready", "slots_of"]

Refused = Callable[[type[pl.LightningModule], Mapping[str, Any]], Iterator[tuple[str, str]]]
"""Given the module class and what the user set under `trainer`: (key, error text) of what cannot be honoured."""

_BASES: Mapping[str, type[Any]] = {"model": pl.LightningModule, "data": pl.LightningDataModule}


@dataclass(frozen=True)
class Canonical:
    """The module classes a recipe chose, and its tree in canonical form."""

    model: type[pl.LightningModule]
    data: type[pl.LightningDataModule]
    tree: Mapping[str, Any]


def slots_of(tree: Mapping[str, Any], default_model: type[pl.LightningModule]) -> Slots:
    """Return which paths of a config hold parts, by the type hints of the module it chooses."""
    model = _class_of("model", tree, default_model, None)
    kinds = {name: next((slot.kind for slot in offered if slot.kind), None) for name, offered in slots(model).items()}
    return Slots({name: partial(_shared, kind) for name, kind in kinds.items() if kind is not None})


def _shared(kind: str, name: str) -> list[str]:
    """The arguments of a part that all of its kind have; none of a part that cannot be imported, as is said later."""
    try:
        part = import_object(name) if "." in name else load(find(kind, name))
        own = arguments_of(part)
    except Exception:  # importing someone's module may raise anything
        return []
    return [argument for argument in arguments_of(BASES[kind]) if argument in own]


def canonical(
    recipe: Recipe,
    command: str,
    *,
    default_model: type[pl.LightningModule],
    default_data: type[pl.LightningDataModule],
    refused: Refused,
) -> Canonical:
    """Expand a recipe.

    Arguments of the default classes stand directly under `model` and `data`; another class keeps its `class_path`, with
    its arguments under `init_args`.

    Raises:
        ConfigError: with every problem of names, kinds, keys and arguments.
    """
    expansion = Expansion(recipe.where)
    model = _class_of("model", recipe.tree, default_model, expansion)
    data = _class_of("data", recipe.tree, default_data, expansion)
    expansion.raise_problems()
    tree = dict(recipe.tree)
    method = arguments_of(getattr(pl.Trainer, command))
    top = ["seed_everything", "run_dir", "model", "data", "trainer"]
    top += [name for name in method if name not in {"model", "datamodule"} and "dataloaders" not in name]
    for key in [key for key in tree if key not in top]:
        owner = next((n for n, cls in (("model", model), ("data", data)) if key in arguments_of(cls)), None)
        near = f"{owner}.{key}" if owner else did_you_mean(key, top)
        expansion.report((key,), f"no such key {key!r}", got=key, expected=", ".join(top), hint=near)
        del tree[key]
    nested = ("model", "data", "trainer")
    tree |= expansion.arguments(_settings, {key: value for key, value in tree.items() if key not in nested}, ())
    for key, target, default in (
        ("model", model, default_model),
        ("data", data, default_data),
        ("trainer", pl.Trainer, pl.Trainer),
    ):
        spec = tree.get(key)
        if spec is None or (isinstance(spec, str) and key in _BASES):
            spec = {}
        if not isinstance(spec, Mapping):
            expansion.report((key,), f"{key} is not a mapping", got=repr(spec), expected="argument: value lines")
            continue
        given = {**(spec.get("init_args") or {}), **{k: v for k, v in spec.items() if k not in _FORM}}
        arguments = expansion.arguments(target, given, (key,))
        class_path = f"{target.__module__}.{target.__qualname__}"
        tree[key] = arguments if target is default else {"class_path": class_path, "init_args": arguments}
    trainer = recipe.tree.get("trainer")
    for key, text in refused(model, trainer if isinstance(trainer, Mapping) else {}):
        expansion.problems.append(f"{recipe.where(('trainer', key))}: {text}")
    expansion.raise_problems()
    return Canonical(model, data, tree)


def _settings(
    *,
    seed_everything: bool | int = True,
    run_dir: str | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    verbose: bool = True,
    return_predictions: bool | None = None,
) -> None:
    """The settings of a run that no class takes."""


_settings.__name__ = "distillkit"


def json_ready(value: Any) -> Any:
    """Return `value` as JSON can hold it; numbers JSON does not have become the texts that YAML reads them from.

    Example:
        >>> json_ready({"a": [float("inf"), 1]})
        {'a': ['.inf', 1]}
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value


_FORM = frozenset({"class_path", "init_args"})


def _class_of(key: str, tree: Mapping[str, Any], default: type[Any], expansion: Expansion | None) -> type[Any]:
    """Return the class that `tree[key]` names, `default` where it names none or a wrong one (which is reported)."""
    spec, base = tree.get(key), _BASES[key]
    path = spec if isinstance(spec, str) else spec.get("class_path") if isinstance(spec, Mapping) else None
    if path is None:
        return default
    got, what = repr(str(path)), f"{path} is not a {base.__name__}"
    try:
        found = import_object(str(path))
        if isinstance(found, type) and issubclass(found, base):
            return found
    except Exception as error:  # importing someone's module may raise anything
        got, what = f"{type(error).__name__}: {error}", f"cannot import {path}"
    if expansion is not None:
        expansion.report((key, "class_path"), what, got=got, expected=f"package.module.Class, a {base.__name__}")
    return default
