"""Which class a short name stands for: the built-ins, and what installed packages add.

A package adds a part with one entry point per class, its group named after the slot:

    [project.entry-points."distillkit.divergence"]
    skew = "distillkit_skew:SkewDivergence"

Listing reads metadata only; a class is imported when it is used. `DISTILLKIT_PLUGINS` chooses what is seen: unset,
every installed package; empty, none; a comma list, only these distributions.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any

from distillkit.errors import ConfigError, PluginLoadError, UnknownComponentError, did_you_mean, problem

__all__ = [
    "BUILT_INS",
    "KINDS",
    "NAME",
    "PLUGINS_VARIABLE",
    "Entry",
    "check_kind",
    "clashes",
    "describe_known",
    "entries",
    "find",
    "import_object",
    "kinds_of",
    "load",
    "name_of",
    "plugins",
]

PLUGINS_VARIABLE = "DISTILLKIT_PLUGINS"

BUILT_INS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sampler": {
            "hf": "distillkit.samplers.hf.HFSampler",
            "vllm": "distillkit.samplers.vllm.VLLMSampler",
            "replay": "distillkit.samplers.replay.ReplaySampler",
            "mixed": "distillkit.samplers.mixed.MixedSampler",
        },
        "teacher": {
            "local": "distillkit.teachers.local.LocalTeacher",
            "vllm": "distillkit.teachers.vllm.VLLMTeacher",
            "adapter_off": "distillkit.teachers.adapter_off.AdapterOffTeacher",
            "mixture": "distillkit.teachers.mixture.MixtureTeacher",
            "cached": "distillkit.teachers.cached.CachedTeacher",
            "extrapolated": "distillkit.teachers.extrapolated.ExtrapolatedTeacher",
        },
        "reward": {
            "math_verify": "distillkit.rewards.math_verify.MathVerify",
            "answer": "distillkit.rewards.answer.AnswerReward",
            "knights_and_knaves": "distillkit.rewards.knights_and_knaves.KnightsAndKnaves",
            "format": "distillkit.rewards.format.FormatReward",
            "length": "distillkit.rewards.length.LengthReward",
            "gsrm": "distillkit.rewards.gsrm.reward.StructureReward",
        },
        "divergence": {
            "k1": "distillkit.divergences.sampled.K1",
            "k2": "distillkit.divergences.sampled.K2",
            "k3": "distillkit.divergences.sampled.K3",
            "topk": "distillkit.divergences.topk.TopK",
            "forward_kl": "distillkit.divergences.full.ForwardKL",
            "reverse_kl": "distillkit.divergences.full.ReverseKL",
            "jsd": "distillkit.divergences.full.JSD",
            "skew_forward_kl": "distillkit.divergences.skew.SkewForwardKL",
            "skew_reverse_kl": "distillkit.divergences.skew.SkewReverseKL",
            "todi": "distillkit.divergences.todi.ToDi",
            "power": "distillkit.divergences.power.PowerDivergence",
        },
        "beta": {
            "constant": "distillkit.betas.constant.Constant",
            "linear": "distillkit.betas.linear.Linear",
            "cosine": "distillkit.betas.cosine.Cosine",
            "switch": "distillkit.betas.switch.Switch",
            "adaptive_kl": "distillkit.betas.adaptive_kl.AdaptiveKL",
            "reward_progress": "distillkit.betas.reward_progress.RewardProgress",
        },
        "masker": {
            "response_level": "distillkit.maskers.response_level.ResponseLevel",
            "group_level": "distillkit.maskers.group_level.GroupLevel",
            "routed": "distillkit.maskers.routed.Routed",
        },
        "objective": {
            "grpo": "distillkit.objectives.grpo.GRPO",
            "gspo": "distillkit.objectives.gspo.GSPO",
            "cispo": "distillkit.objectives.cispo.CISPO",
            "rlsd": "distillkit.objectives.rlsd.RLSD",
            "trrd": "distillkit.objectives.trrd.TRRD",
        },
    }
)
"""Kind -> short name -> class path. The kinds stand in data-flow order."""

KINDS: tuple[str, ...] = tuple(BUILT_INS)

NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a short name looks like; a dot would mean an import path."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One named part: `class_path` is importable; `distribution` and `version` say which package offers it."""

    kind: str
    name: str
    class_path: str
    distribution: str = "distillkit"
    version: str = ""

    @property
    def built_in(self) -> bool:
        """Whether distillkit itself offers the part."""
        return self.distribution == "distillkit"

    @property
    def source(self) -> str:
        """The package as listings name it: `distillkit`, or `distribution version`.

        Example:
            >>> Entry(kind="reward", name="x", class_path="p.X", distribution="my-rewards", version="0.1").source
            'my-rewards 0.1'
        """
        return self.distribution if self.built_in else f"{self.distribution} {self.version}".rstrip()


def entries(kind: str | None = None) -> list[Entry]:
    """Return the parts of `kind`, or of every kind in data-flow order, by name; imports none of them."""
    found = [
        Entry(kind=k, name=name, class_path=path)
        for k in (KINDS if kind is None else (check_kind(kind),))
        for name, path in BUILT_INS[k].items()
    ]
    found += [e for e in plugins() if kind in (None, e.kind)]
    return sorted(found, key=lambda e: (KINDS.index(e.kind), e.name, not e.built_in, e.distribution))


def plugins() -> list[Entry]:
    """Return the parts that installed packages add, as far as `DISTILLKIT_PLUGINS` lets them through."""
    wanted = os.environ.get(PLUGINS_VARIABLE)
    chosen = None if wanted is None else {_normal(name) for name in wanted.split(",") if name.strip()}
    if chosen is not None and not chosen:
        return []
    return [e for e in _installed() if chosen is None or _normal(e.distribution) in chosen]


def find(kind: str, name: str) -> Entry:
    """Return the part of `kind` called `name`.

    Raises:
        UnknownComponentError: no part of this kind has the name; the text lists those there are.
        ConfigError: two packages claim the name.

    Example:
        >>> find("divergence", "k2").class_path
        'distillkit.divergences.sampled.K2'
    """
    found = [e for e in entries(kind) if e.name == name]
    if not found:
        where, hint = _why_unknown(kind, name)
        raise UnknownComponentError(problem(where, got=repr(name), expected=describe_known(kind), hint=hint))
    if len(found) > 1:
        both = " and ".join(f"{e.source} ({e.class_path})" for e in found)
        raise ConfigError(
            problem(
                f"two packages offer the {kind} {name!r}",
                got=both,
                expected="one of them",
                hint=f"class_path: {found[-1].class_path}, or name the packages to load in {PLUGINS_VARIABLE}",
            )
        )
    return found[0]


def load(entry: Entry) -> type[Any]:
    """Import the class of `entry`.

    Raises:
        PluginLoadError: it does not import.
    """
    try:
        loaded = import_object(entry.class_path)
    except Exception as error:  # a plugin may raise anything while it is imported
        raise PluginLoadError(
            problem(
                f"the {entry.kind} {entry.name!r} of {entry.source} does not load",
                got=f"{type(error).__name__}: {error}",
                expected=f"{entry.class_path} to import",
                hint=None if entry.built_in else f"update or uninstall {entry.distribution}",
            )
        ) from error
    if not isinstance(loaded, type):
        raise PluginLoadError(
            problem(
                f"the {entry.kind} {entry.name!r} of {entry.source} is not a class",
                got=f"{entry.class_path}, a {type(loaded).__name__}",
                expected="an entry point that names a class",
            )
        )
    return loaded


def name_of(cls: type[Any]) -> str:
    """Return the short name of a component class, or its own name where it has none.

    Example:
        >>> from distillkit.betas.constant import Constant
        >>> name_of(Constant)
        'constant'
    """
    path = f"{cls.__module__}.{cls.__qualname__}"
    return next((entry.name for entry in entries(getattr(cls, "kind", None)) if entry.class_path == path), cls.__name__)


def import_object(path: str) -> Any:
    """Import `package.module.Class` (or a nested or module-level name) by its dotted path.

    Raises:
        ImportError: a module on the way is not there or does not import, or the last one has no such name.

    Example:
        >>> import_object("collections.OrderedDict").__name__
        'OrderedDict'
    """
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")) and split > 1:
                continue
            raise
        for i, part in enumerate(parts[split:], start=split):
            if not hasattr(target, part):
                holder = ".".join(parts[:i])
                near = did_you_mean(part, [n for n in dir(target) if not n.startswith("_")])
                hint = f"; did you mean {near!r}?" if near else ""
                raise ImportError(f"{holder} has no {part!r}{hint}")
            target = getattr(target, part)
        return target
    raise ImportError(f"{path!r} is not a dotted path")


def kinds_of(name: str) -> list[str]:
    """Return the kinds that have a part called `name`.

    Example:
        >>> kinds_of("k2")
        ['divergence']
    """
    return list(dict.fromkeys(e.kind for e in entries() if e.name == name))


def clashes() -> dict[tuple[str, str], list[Entry]]:
    """Return the (kind, name) pairs that more than one package claims."""
    by_name: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries():
        by_name.setdefault((entry.kind, entry.name), []).append(entry)
    return {key: found for key, found in by_name.items() if len(found) > 1}


def describe_known(kind: str) -> str:
    """Return the names of `kind` for an error text, with the package of those that are not built in.

    Example:
        >>> describe_known("masker")
        'group_level, response_level, routed'
    """
    return ", ".join(dict.fromkeys(e.name if e.built_in else f"{e.name} ({e.source})" for e in entries(kind)))


def check_kind(kind: str) -> str:
    """Return `kind`, or raise `UnknownComponentError` when there is no such slot."""
    if kind not in KINDS:
        raise UnknownComponentError(
            problem(
                f"{kind!r} is not a kind of part",
                got=repr(kind),
                expected=", ".join(KINDS),
                hint=did_you_mean(kind, KINDS),
            )
        )
    return kind


def _why_unknown(kind: str, name: str) -> tuple[str, str | None]:
    """Return what is wrong with `name`, and what to try."""
    others = kinds_of(name)
    near = did_you_mean(name, [e.name for e in entries(kind)])
    if others:
        return f"{name!r} is a {', a '.join(others)}, not a {kind}", near
    hidden = [e for e in _installed() if (e.kind, e.name) == (kind, name)]
    if hidden:
        value = os.environ.get(PLUGINS_VARIABLE, "")
        return (
            f"the {kind} {name!r} is switched off",
            f"{PLUGINS_VARIABLE}={value!r} leaves {hidden[0].source} out: add it there",
        )
    everywhere = did_you_mean(name, [e.name for e in entries()])
    if near is None and everywhere is not None:
        near = f"{everywhere} (a {', a '.join(kinds_of(everywhere))})"
    return f"unknown {kind} {name!r}", near or "class_path: package.module.Class for a part that has no short name"


def _installed() -> list[Entry]:
    """Every entry point in a distillkit group, each once: an editable install can show up twice."""
    found: dict[Entry, None] = {}
    for kind in KINDS:
        for point in metadata.entry_points(group=f"distillkit.{kind}"):
            dist = point.dist
            if dist is None:
                continue
            path = point.value.replace(":", ".").replace(" ", "")
            entry = Entry(kind=kind, name=point.name, class_path=path, distribution=dist.name, version=dist.version)
            found[entry] = None
    return list(found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
