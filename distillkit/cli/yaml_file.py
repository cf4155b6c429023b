"""YAML with the source of every key: what error texts need to name file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from distillkit.errors import ConfigError, problem

__all__ = ["KeyPath", "Raw", "dotted", "dump_yaml", "load_yaml", "plain", "source_path", "typed"]

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a config."""


class Raw(str):
    """A value as it was typed on the command line; whether `7` is a number or a text is for the argument to say."""


class _YamlLoader(yaml.SafeLoader):
    """YAML with `1e-4` a number and dates left as text, as the config parser reads them."""


_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_YamlLoader.yaml_implicit_resolvers = {
    letter: [(tag, regexp) for tag, regexp in found if tag not in _REPLACED]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load_yaml(text: str, file: str) -> tuple[Any, dict[KeyPath, str]]:
    r"""Parse a config; return its value, and the file and line of each key.

    Raises:
        ConfigError: not YAML, or a key that stands twice in one mapping.

    Example:
        >>> load_yaml("a:\n  b: 1e-4", "x.yaml")
        ({'a': {'b': 0.0001}}, {('a',): 'x.yaml, line 1', ('a', 'b'): 'x.yaml, line 2'})
    """
    loader = _YamlLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        sources = dict(_marks(node, (), file))
        return loader.construct_document(node), sources
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f"{error.context}: " if error.context else ""
        raise ConfigError(
            problem(
                f"{file}{place}: not valid YAML",
                got=f"{context}{error.problem}",
                expected="key: value lines, indented with spaces",
            )
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(problem(f"{file}: not valid YAML", got=str(error))) from error
    finally:
        loader.dispose()


def typed(text: str) -> Any:
    """Return a command-line value: structures and null are read as YAML, everything else stays as typed.

    Example:
        >>> typed("[k2, 3]"), typed("null"), typed("3")
        (['k2', 3], None, '3')
    """
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError:
        return Raw(text)
    return value if isinstance(value, list | dict) or (value is None and text.strip()) else Raw(text)


def plain(value: Any) -> Any:
    """Return `value` with command-line texts read as YAML.

    Example:
        >>> plain([Raw("0.5"), "0.5"])
        [0.5, '0.5']
    """
    if isinstance(value, Raw):
        try:
            return yaml.load(value, Loader=_YamlLoader) if value else ""
        except yaml.YAMLError:
            return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def dump_yaml(value: Any) -> str:
    """Return `value` as block-style YAML, keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False)


def dotted(path: KeyPath) -> str:
    """Return a path as error texts write it, without the `init_args` of canonical configs.

    Example:
        >>> dotted(("model", "rewards", 1, "init_args", "weight"))
        'model.rewards[1].weight'
    """
    text = ""
    for key in source_path(path):
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def source_path(path: KeyPath) -> KeyPath:
    """Return `path` without `init_args`: canonical and short form then name a value alike."""
    return tuple(key for key in path if key != "init_args")


def _marks(node: yaml.Node, path: KeyPath, file: str) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen and name != "<<":
                raise ConfigError(
                    problem(
                        f"{file}, line {line}, {dotted((*path, name))}: the key stands there twice",
                        got=f"also in line {seen[name]}",
                        expected="each key once",
                    )
                )
            seen[name] = line
            yield source_path((*path, name)), f"{file}, line {line}"
            yield from _marks(value, (*path, name), file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield source_path((*path, index)), f"{file}, line {value.start_mark.line + 1}"
            yield from _marks(value, (*path, index), file)
