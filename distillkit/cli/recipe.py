"""Config files and command line, merged into one tree that remembers where each value came from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.cli.shipped import find_config, run_name
from distillkit.cli.yaml_file import KeyPath, Raw, dotted, dump_yaml, load_yaml, plain, source_path, typed
from distillkit.errors import ConfigError, problem

__all__ = ["COMMAND_LINE", "Arguments", "Recipe", "Slots", "override", "read_arguments", "read_recipe", "recipe_text"]


@dataclass(frozen=True)
class Slots:
    """Which paths hold parts (a text there is a part's name), and what a part that is named alone keeps.

    `shared`: argument of the module that holds parts -> given a part's name, the arguments it shares with all parts of
    its slot.
    """

    shared: Mapping[str, Callable[[str], Collection[str]]]

    def __call__(self, at: KeyPath) -> bool:
        return len(at) > 1 and at[0] == "model" and at[1] in self.shared

    def kept(self, node: Any, name: str, at: KeyPath) -> dict[str, Any]:
        """Return what stays of the part `node` when `name` takes its place."""
        if not self(at) or not isinstance(node, Mapping):
            return {}
        arguments = {**node, **(node.get("init_args") or {})}
        return {key: arguments[key] for key in self.shared[str(at[1])](name) if key in arguments}


_CLASS_FORM = frozenset({"class_path", "init_args", "dict_kwargs"})
_CLASS_KEYS = frozenset({("model",), ("model", "class_path")})
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Recipe:
    """What the user wrote: config files in their order, then the command line.

    `tree` is the merged config in short form, `sources` says where each value came from, `flags` are options that are
    handed through (`--help`, `--print_config`), `text` is the one config file as it stands when nothing was overridden.
    """

    name: str
    tree: Mapping[str, Any]
    sources: Mapping[KeyPath, str]
    flags: tuple[str, ...] = ()
    text: str | None = None
    argv: tuple[str, ...] = ()

    def where(self, path: KeyPath) -> str:
        """Return source and YAML path of a value, for an error text."""
        known = source_path(path)
        for end in range(len(known), 0, -1):
            if (source := self.sources.get(known[:end])) is not None:
                return f"{source}, {dotted(path)}"
        below = next((source for key, source in self.sources.items() if key[: len(known)] == known), None)
        return f"{below}, {dotted(path)}" if below else dotted(path)


@dataclass(frozen=True)
class Arguments:
    """The command line taken apart: config files, overrides as (path, value), options to hand through."""

    configs: tuple[str, ...]
    overrides: tuple[tuple[tuple[str, ...], Any], ...]
    flags: tuple[str, ...]


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Take the arguments after the subcommand apart.

    Raises:
        ConfigError: an argument that is no option, or an option without its value.
    """
    configs: list[str] = []
    overrides: list[tuple[tuple[str, ...], Any]] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        option, equals, value = token.partition("=")
        if not option.startswith("-") or option == "-":
            raise ConfigError(
                problem(
                    "command line: an argument that belongs to no option",
                    got=repr(token),
                    expected="--key value, such as --trainer.max_steps 100",
                    hint=f"--config {token}" if "=" not in token else f"--{token}",
                )
            )
        if option in ("-h", "--help", "--print_config") or option.endswith(".help"):
            flags.append(token)
            if option.endswith(".help") and not equals and rest and not rest[0].startswith("-"):
                flags.append(rest.pop(0))
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(problem(f"command line: {option} has no value", expected=f"{option} VALUE"))
            value = rest.pop(0)
        if option in ("-c", "--config"):
            configs.append(value)
        elif not option.startswith("--"):
            raise ConfigError(problem("command line: unknown option", got=option, expected="--key value"))
        else:
            overrides.append((tuple(option[2:].split(".")), typed(value)))
    return Arguments(configs=tuple(configs), overrides=tuple(overrides), flags=tuple(flags))


def read_recipe(command: str, argv: Sequence[str], slots_of: Callable[[Mapping[str, Any]], Slots]) -> Recipe:
    """Read the config files that `argv` names and put its overrides on top.

    The command line wins over files, later files over earlier ones. Naming a part starts it afresh; a name alone
    (`--model.sampler vllm`) keeps what all parts of the slot have, such as a sampler's `group_size`. A mapping without
    `name` and `class_path`, or a longer path on the command line, changes single arguments of the part that is there.
    `--key+ value` appends to a list.

    Args:
        command: the subcommand.
        argv: the arguments after it.
        slots_of: given the tree so far, which paths hold parts.
    """
    arguments = read_arguments(argv)
    tree: dict[str, Any] = {}
    sources: dict[KeyPath, str] = {}
    text, name = None, "run"
    for config in arguments.configs:
        path = find_config(config)
        text, value, marks = _read_file(path, config)
        name = _config_name(path)
        tree = override(tree, (), value, slots_of({**tree, **value}))
        sources |= marks
    for keys, value in sorted(arguments.overrides, key=lambda item: item[0] not in _CLASS_KEYS):
        tree = override(tree, keys, value, slots_of(tree))
        at = source_path(tuple(key.removesuffix("+") for key in keys))
        if not isinstance(value, Mapping) and not keys[-1].endswith("+"):
            sources = {p: s for p, s in sources.items() if p[: len(at)] != at}
        sources[at] = COMMAND_LINE
    return Recipe(
        name=name,
        tree=tree,
        sources=sources,
        flags=arguments.flags,
        text=text if len(arguments.configs) == 1 and not arguments.overrides else None,
        argv=(command, *argv),
    )


def override(node: Any, keys: Sequence[str], value: Any, slots: Slots, at: KeyPath = ()) -> Any:
    """Return `node` with `value` put at `keys`; `node` itself is left as it is.

    Example:
        >>> slots = Slots({"divergence": lambda name: (), "sampler": lambda name: ["group_size"]})
        >>> override({"model": {"divergence": "topk"}}, ["model", "divergence", "k"], 5, slots)
        {'model': {'divergence': {'name': 'topk', 'k': 5}}}
        >>> tree = {"model": {"sampler": {"name": "hf", "group_size": 4, "rows_per_batch": 64}}}
        >>> override(tree, ["model", "sampler"], "vllm", slots)
        {'model': {'sampler': {'name': 'vllm', 'group_size': 4}}}
    """
    if not keys:
        return _merge(node, value, slots, at)
    head, rest = keys[0], keys[1:]
    if isinstance(node, list) and node:
        index = int(head) if head.isdigit() else len(node) - 1
        below = rest if head.isdigit() else keys
        if index >= len(node):
            raise ConfigError(
                problem(
                    f"{COMMAND_LINE}, {dotted((*at, index))}: no such entry",
                    got=f"index {index}",
                    expected=f"0 to {len(node) - 1}, or --{dotted(at)}+ to append",
                )
            )
        return [*node[:index], override(node[index], below, value, slots, (*at, index)), *node[index + 1 :]]
    mapping = _as_mapping(node, slots, at)
    if not rest and _names_part({head}, slots, at):
        return {head: value}
    if head == "init_args" and "class_path" not in mapping:
        return override(mapping, rest, value, slots, at)
    if "class_path" in mapping and head not in _CLASS_FORM and head not in mapping and _nested(mapping):
        inner = mapping.get("init_args") or {}
        return {**mapping, "init_args": override(inner, keys, value, slots, at)}
    for end in range(len(keys), 1, -1):
        if (joined := ".".join(keys[:end])) in mapping:
            head, rest = joined, keys[end:]
            break
    if head.endswith("+") and not rest:
        head = head[:-1]
        before = mapping.get(head)
        items = before if isinstance(before, list) else [] if before is None else [before]
        return {**mapping, head: [*items, *(value if isinstance(value, list) else [value])]}
    return {**mapping, head: override(mapping.get(head), rest, value, slots, (*at, head))}


def recipe_text(recipe: Recipe, config: Mapping[str, Any]) -> str:
    """Return `recipe.yaml`: the config file as it stands, or the merged tree when there was more than one file.

    Args:
        recipe: what the user wrote.
        config: the canonical config, which knows whether a `7` on the command line was a number or a text.
    """
    if recipe.text is not None:
        return recipe.text
    header = f"# distillkit {shlex.join(recipe.argv)}".replace("\n", " ")
    return f"{header}\n{dump_yaml(_settled(recipe.tree, config))}"


def _settled(value: Any, canonical: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _settled(item, _child(canonical, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_settled(item, _child(canonical, i)) for i, item in enumerate(value)]
    if isinstance(value, Raw):
        return str(value) if isinstance(canonical, str) else plain(value)
    return value


def _child(canonical: Any, key: Any) -> Any:
    if isinstance(canonical, Mapping):
        inside = canonical.get("init_args")
        return canonical[key] if key in canonical else _child(inside, key) if isinstance(inside, Mapping) else None
    return canonical[key] if isinstance(canonical, list) and isinstance(key, int) and key < len(canonical) else None


def _merge(node: Any, value: Any, slots: Slots, at: KeyPath) -> Any:
    if isinstance(value, str) and (kept := slots.kept(node, value, at)):
        return {**_as_mapping(value, slots, at), **kept}
    if not isinstance(value, Mapping) or _names_part(value.keys(), slots, at):
        return value
    if isinstance(node, str) and not slots(at):
        return value
    for key, item in value.items():
        node = override(node, (str(key),), item, slots, at)
    return {} if node is None else node


def _names_part(keys: Collection[str], slots: Slots, at: KeyPath) -> bool:
    return "class_path" in keys or ("name" in keys and slots(at))


def _as_mapping(node: Any, slots: Slots, at: KeyPath) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, str):
        if slots(at):
            return {"class_path" if "." in node else "name": str(node)}
        if at and at[0] in ("model", "trainer"):
            return {"class_path": str(node)}
    return {}


def _nested(mapping: Mapping[str, Any]) -> bool:
    return "init_args" in mapping or not (mapping.keys() - _CLASS_FORM)


def _read_file(path: Path, shown: str) -> tuple[str, dict[str, Any], dict[KeyPath, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(problem(f"{shown}: cannot be read", got=str(error), expected="a UTF-8 text file")) from error
    value, marks = load_yaml(text, str(path))
    if not isinstance(value, Mapping):
        got = "an empty file" if value is None else f"a {type(value).__name__}"
        raise ConfigError(
            problem(f"{path}: not a config", got=got, expected="a mapping with keys such as model, data and trainer")
        )
    return text, dict(value), marks


def _config_name(path: Path) -> str:
    """The name of a run: the file's, or that of the run whose folder the file lies in."""
    status = path.parent / "status.json"
    if path.name in ("config.yaml", "recipe.yaml") and status.is_file():
        try:
            return str(json.loads(status.read_text(encoding="utf-8"))["config_name"])
        except (ValueError, KeyError, TypeError):
            return path.parent.name
    return run_name(path)
