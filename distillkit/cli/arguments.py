"""What a class takes: its slots, and every unknown, missing or mistyped argument of a call, not only the first."""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from distillkit.cli.yaml_file import Raw, load_yaml, plain
from distillkit.components import (
    BetaScheduler,
    Component,
    DivergenceEstimator,
    Masker,
    PolicyObjective,
    RewardFn,
    RolloutSampler,
    TeacherScorer,
)
from distillkit.errors import ConfigError, did_you_mean, problem

__all__ = [
    "BASES",
    "REQUIRED",
    "Argument",
    "Slot",
    "arguments_of",
    "choice",
    "dump",
    "hint_text",
    "problems",
    "refusal",
    "slots",
    "spelled_out",
    "typed_for",
]

BASES: Mapping[str, type[Component]] = {
    base.kind: base
    for base in (
        RolloutSampler,
        TeacherScorer,
        RewardFn,
        DivergenceEstimator,
        BetaScheduler,
        Masker,
        PolicyObjective,
    )
}
"""Kind -> the base class that a parameter's type hint names."""

_SEQUENCES = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_MANY = 36
"""A longer list of known arguments hides the one that was meant."""
_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Parser key", "Problem with given class_path")


@dataclass(frozen=True)
class Slot:
    """A parameter for a part (`kind`) or a settings dataclass (`settings`): one, a list, or a mapping of them."""

    kind: str | None
    settings: type[Any] | None
    shape: Literal["one", "list", "mapping"] = "one"


@dataclass(frozen=True)
class Argument:
    """A constructor argument: its type hint, and its default (`REQUIRED` where it has none)."""

    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is REQUIRED


REQUIRED = inspect.Parameter.empty


def arguments_of(target: Callable[..., Any]) -> dict[str, Argument]:
    """Return the arguments of a class's constructor (or of a function), those that `**kwargs` hands on included.

    Example:
        >>> class Base:
        ...     def __init__(self, *, size: int = 1) -> None: ...
        >>> class Part(Base):
        ...     def __init__(self, *, label: str, **kwargs: object) -> None: ...
        >>> {name: hint_text(argument.hint) for name, argument in arguments_of(Part).items()}
        {'label': 'str', 'size': 'int'}
    """
    found: dict[str, Argument] = {}
    for function in _constructors(target):
        parameters = inspect.signature(function).parameters
        known = _resolved(function)
        for name, p in parameters.items():
            if name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                found.setdefault(name, Argument(known.get(name, Any), p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def slots(target: Callable[..., Any]) -> dict[str, tuple[Slot, ...]]:
    """Return the parameters that take parts or settings, found by type hint alone; a union may offer several."""
    found = {name: tuple(_slots_of(argument.hint)) for name, argument in arguments_of(target).items()}
    return {name: offered for name, offered in found.items() if offered}


def choice(target: Callable[..., Any], name: str) -> type[Any] | None:
    """Return the base class of what the argument `name` takes, where that class names its ready-made ones.

    Such a class is no slot: it is an argument of one part (what takes traces apart, for a reward), with a table
    `short_names` of its own.
    """
    argument = arguments_of(target).get(name)
    hint = None if argument is None else argument.hint
    offered = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((cls for cls in offered if isinstance(cls, type) and hasattr(cls, "short_names")), None)


def problems(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    where: Callable[[str | None], str],
    checked: Collection[str] = (),
    *,
    partial: bool = False,
) -> Iterator[str]:
    """Yield one error text per argument of `given` that `target` does not take as it is.

    Args:
        target: a class, or a function that returns an instance of one.
        given: arguments, parts in canonical form.
        where: source and YAML path of an argument, of the whole call for None.
        checked: arguments whose own problems are reported already.
        partial: further arguments are added before the call (an optimizer's parameters): what is missing is not asked.
    """
    title = getattr(target, "__name__", str(target))
    arguments = arguments_of(target)
    later = {name for name, argument in arguments.items() if partial and argument.required and name not in given}
    parser = _parser(target, skip=later)
    known = list(parser.get_defaults().as_dict())
    unknown = [name for name in given if name not in known]
    for name in unknown:
        near = did_you_mean(name, known)
        listed = None if near and len(known) > _MANY else ", ".join(known) or "no arguments"
        yield problem(f"{where(name)}: {title} has no argument {name!r}", got=name, expected=listed, hint=near)
    call = {name: value for name, value in given.items() if name in known and name not in checked}
    message = _complaint(parser, call)
    if message is None:
        return
    wrong = bool(unknown or checked)
    for name, value in call.items():
        complaint = _complaint(_parser(target, skip=later | set(known) - {name}), {name: value})
        if complaint is None:
            continue
        wrong = True
        reasons = "; ".join(_reasons(complaint)) if isinstance(value, Mapping | list) else ""
        yield problem(
            f"{where(name)}: not what {title} takes" + (f": {reasons}" if reasons else ""),
            got=repr(value),
            expected=hint_text(arguments[name].hint if name in arguments else Any),
        )
    for name, argument in arguments.items():
        if argument.required and name not in given and not partial:
            wrong = True
            expected = f"{name}: {hint_text(argument.hint)}"
            yield problem(f"{where(None)}: {title} misses the argument {name!r}", expected=expected)
    if not wrong:
        yield problem(f"{where(None)}: {title} cannot be made of this", got=message)


def refusal(target: Callable[..., Any], given: Mapping[str, Any]) -> str | None:
    """Return what the constructor of a part says against arguments of the right types; None where it takes them.

    The part is made for that, so this is for parts whose constructors do nothing but look at numbers. What is no
    `ConfigError` is left to whoever makes the part in earnest.
    """
    parser = _parser(target)
    try:
        parsed = parser.instantiate(parser.parse_object(copy.deepcopy(dict(given))))
        target(**parsed.as_dict())
    except ConfigError as error:
        return str(error)
    except Exception:  # a constructor may raise anything
        return None
    return None


def typed_for(target: Callable[..., Any], name: str, text: Raw) -> Any:
    """Return a command-line text as the argument `name` takes it: read as YAML, or as it stands.

    Example:
        >>> def build(*, path: str, size: int | None = None) -> None: ...
        >>> typed_for(build, "path", Raw("7")), typed_for(build, "size", Raw("7"))
        ('7', 7)
    """
    value = plain(text)
    if isinstance(value, str) or name not in arguments_of(target):
        return str(text)
    others = {other for other in arguments_of(target) if other != name}
    return str(text) if _complaint(_parser(target, skip=others), {name: value}) else value


def spelled_out(target: Callable[..., Any], name: str, value: Any) -> Any:
    """Return a class (of an optimizer, a scheduler) with every default of its own.

    The config parser would otherwise keep what the argument's default class had under the same name: SGD would inherit
    the weight decay of AdamW. A value that does not parse is returned as it is.
    """
    argument = arguments_of(target).get(name)
    named = isinstance(value, str) or (isinstance(value, Mapping) and "class_path" in value)
    if argument is None or not named or not callable(argument.default) or argument.required:
        return value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=argument.hint)
    try:
        parsed = parser.parse_object({"value": copy.deepcopy(value)})
    except ArgumentError:
        return value
    return load_yaml(dump(parser, parsed), name)[0]["value"]


def dump(parser: ArgumentParser, parsed: Namespace) -> str:
    """Return a parsed config as YAML, nulls included."""
    text: str = parser.dump(parsed, format="yaml", skip_unset=False)
    return text


def hint_text(hint: Any) -> str:
    """Return a type hint as a person writes it.

    Example:
        >>> hint_text(int | None), hint_text(dict[str, float]), hint_text(typing.Literal["a", "b"])
        ('int or null', 'dict[str, float]', "'a' or 'b'")
    """
    if hint is Any:
        return "any value"
    if hint is type(None):
        return "null"
    if _is_union(hint):
        return " or ".join(dict.fromkeys(hint_text(arg) for arg in typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(arg) for arg in typing.get_args(hint))
    if isinstance(hint, type) and not typing.get_args(hint):
        kind = next((k for k, base in BASES.items() if base is hint), None)
        if dataclasses.is_dataclass(hint):
            return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
        if kind is None and (names := getattr(hint, "short_names", None)):
            return f"{hint.__name__} ({', '.join(names)})"
        return f"a {kind}" if kind else hint.__name__
    return re.sub(r"\b(?:\w+\.)+(\w)", r"\1", str(hint))


def _slots_of(hint: Any) -> Iterator[Slot]:
    if _is_union(hint):
        for arg in typing.get_args(hint):
            yield from _slots_of(arg)
        return
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from _slots_of(args[0])
    elif origin in _SEQUENCES and args:
        yield from (dataclasses.replace(slot, shape="list") for slot in _slots_of(args[0]))
    elif origin in _MAPPINGS and len(args) == 2:
        yield from (dataclasses.replace(slot, shape="mapping") for slot in _slots_of(args[1]))
    elif isinstance(hint, type) and origin is None:
        kind = next((k for k, base in BASES.items() if issubclass(hint, base)), None)
        if kind is not None:
            yield Slot(kind, None)
        elif dataclasses.is_dataclass(hint):
            yield Slot(None, hint)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    if not isinstance(target, type):
        return [target]
    return [cls.__dict__["__init__"] for cls in target.__mro__ if cls is not object and "__init__" in cls.__dict__]


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of a function; one that names what is imported for type checkers only is left out, not the rest."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # annotations are arbitrary expressions
        found: dict[str, Any] = {}
        for name, annotation in getattr(function, "__annotations__", {}).items():
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                found |= typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))
            except Exception:  # this one cannot be resolved at run time
                continue
        return found


def _parser(target: Callable[..., Any], skip: set[str] | None = None) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    options: dict[str, Any] = {"fail_untyped": False, "skip": set(skip or ()), "sub_configs": True}
    if isinstance(target, type):
        parser.add_class_arguments(target, None, instantiate=False, **options)
    else:
        parser.add_function_arguments(target, None, **options)
    return parser


def _complaint(parser: ArgumentParser, call: Mapping[str, Any]) -> str | None:
    try:
        parser.parse_object(copy.deepcopy(dict(call)))  # the parser edits what it is given
    except ArgumentError as error:
        return str(error)
    return None


def _reasons(message: str) -> list[str]:
    """The leaves of jsonargparse's error tree, without the branches that only say "or null"."""
    leaves = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    kept = [leaf for leaf in leaves if leaf and not leaf.startswith(_NOISE) and "NoneType" not in leaf]
    return list(dict.fromkeys(kept))
