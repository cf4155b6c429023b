"""Short names to `class_path` and `init_args`: the one pass that config files and the command line both go through.

A slot is found by the type hint of a constructor argument, never by its key; the chosen class is searched for slots of
its own. Inside a slot these mean the same:

    k2    {name: k2}    {class_path: distillkit.divergences.sampled.K2}    distillkit.divergences.sampled.K2

A bare number in a `beta` slot is `constant` with that value; a function in a `reward` slot is wrapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from distillkit import registry
from distillkit.cli.arguments import BASES, Slot, arguments_of, choice, problems, refusal, slots, spelled_out, typed_for
from distillkit.cli.yaml_file import KeyPath, Raw, dotted, plain
from distillkit.errors import ConfigError, DistillkitError, did_you_mean, problem

__all__ = ["Expansion", "expand"]

_FUNCTION_REWARD = "distillkit.rewards.function.FunctionReward"
_CLASS_FORM = frozenset({"class_path", "init_args", "dict_kwargs"})
_FORM = _CLASS_FORM | {"name"}


def expand(kind: str, spec: Any) -> Any:
    """Return the canonical form of what stands in a slot of `kind`.

    Raises:
        ConfigError: with every problem in it, at once.

    Example:
        >>> expand("divergence", "k2")
        {'class_path': 'distillkit.divergences.sampled.K2', 'init_args': {}}
        >>> expand("beta", 0.5)["init_args"]
        {'value': 0.5}
    """
    expansion = Expansion(dotted)
    value = expansion.slot(kind, spec, (kind,))
    expansion.raise_problems()
    return value


class Expansion:
    """One pass over a config, which collects what is wrong with it.

    Args:
        where: source and YAML path of a value, for error texts.
    """

    def __init__(self, where: Callable[[KeyPath], str]) -> None:
        self.problems: list[str] = []
        self._where = where

    def raise_problems(self) -> None:
        """Raise one `ConfigError` of all problems found, if any."""
        if len(self.problems) == 1:
            raise ConfigError(self.problems[0])
        if self.problems:
            raise ConfigError("\n\n".join([f"{len(self.problems)} problems in the config", *self.problems]))

    def report(self, path: KeyPath, what: str, **rest: Any) -> None:
        """Add the problem `what` at `path`."""
        self.problems.append(problem(f"{self._where(path)}: {what}", **rest))

    def arguments(self, target: Callable[..., Any], given: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """Return constructor arguments with every slot expanded; `path` is where they stand."""
        found, known = len(self.problems), slots(target)
        call: dict[str, Any] = {}
        checked: set[str] = set()
        for name, value in given.items():
            offered = known.get(name, ())
            before = len(self.problems)
            at = (*path, name)
            if offered:
                call[name] = self._expanded(offered, value, at)
            elif (base := choice(target, name)) is not None:
                call[name] = self._chosen(base, value, at)
            else:
                settled = typed_for(target, name, value) if isinstance(value, Raw) else _class_form(plain(value))
                call[name] = spelled_out(target, name, settled)
                self._check_classes(call[name], at)
            if len(self.problems) > before:
                checked.add(name)
        self.problems += problems(target, call, self._places(path), checked)
        return call if len(self.problems) == found else {}

    def slot(self, kind: str, spec: Any, path: KeyPath) -> Any:
        """Return the canonical form of one part; None stays None."""
        spec = plain(spec) if isinstance(spec, Raw) else spec
        if spec is None:
            return None
        if kind == "beta" and isinstance(spec, int | float) and not isinstance(spec, bool):
            spec = {"name": "constant", "value": spec}
        if isinstance(spec, str):
            spec = {"class_path" if "." in spec else "name": spec}
        if not isinstance(spec, Mapping):
            got = f"{spec!r}, a {type(spec).__name__}"
            number = "a number, " if kind == "beta" else ""
            expected = f"{number}a name, or a mapping with the name of one: {_names(kind)}"
            return self.report(path, f"not a {kind}", got=got, expected=expected)
        if ("name" in spec) == ("class_path" in spec):
            what = (
                "both name and class_path" if "name" in spec else f"which {kind}? neither name nor class_path is given"
            )
            keys = ", ".join(str(key) for key in spec)
            return self.report(path, what, got=keys or "{}", expected=f"name: one of {_names(kind)}")
        target, class_path = self._target(kind, spec, path)
        if target is None:
            return None
        args = self._own_arguments(spec, path)
        at = (*path, "init_args") if "init_args" in spec else path
        if kind == "reward" and not isinstance(target, type) and not _makes(target, kind):
            args = self._function_arguments(target, class_path, args, at)
            class_path, target = _FUNCTION_REWARD, registry.import_object(_FUNCTION_REWARD)
        found = len(self.problems)
        args = self.arguments(target, args, at)
        if kind == "beta" and len(self.problems) == found and "dict_kwargs" not in spec:
            self._check_schedule(target, args, at)
        call = {"class_path": class_path, "init_args": args}
        return call | ({"dict_kwargs": spec["dict_kwargs"]} if "dict_kwargs" in spec else {})

    def _chosen(self, base: type[Any], spec: Any, path: KeyPath) -> Any:
        """Return the canonical form of an argument whose class has short names of its own; None stays None."""
        spec = plain(spec) if isinstance(spec, Raw) else spec
        if spec is None:
            return None
        if isinstance(spec, str):
            spec = {"class_path" if "." in spec else "name": spec}
        names: Mapping[str, str] = base.short_names
        known = f"{', '.join(names)}, or the class path of a {base.__name__}"
        if not isinstance(spec, Mapping) or ("name" in spec) == ("class_path" in spec):
            return self.report(path, f"which {base.__name__}?", got=repr(spec), expected=f"name: {known}")
        name = str(spec.get("name", spec.get("class_path")))
        if "name" in spec and name not in names:
            near = did_you_mean(name, names)
            return self.report(path, f"no {base.__name__} {name!r}", got=repr(name), expected=known, hint=near)
        class_path = names[name] if "name" in spec else name
        try:
            target = registry.import_object(class_path)
        except Exception as error:  # importing someone's module may raise anything
            got = f"{type(error).__name__}: {error}"
            return self.report(path, f"cannot import {class_path}", got=got, expected=known)
        if not isinstance(target, type) or not issubclass(target, base) or inspect.isabstract(target):
            return self.report(path, f"{class_path} is not a {base.__name__}", got=name, expected=known)
        at = (*path, "init_args") if "init_args" in spec else path
        return {"class_path": class_path, "init_args": self.arguments(target, self._own_arguments(spec, path), at)}

    def _target(self, kind: str, spec: Mapping[str, Any], path: KeyPath) -> tuple[Callable[..., Any] | None, str]:
        """Import what `spec` names and check that it fits the slot."""
        name = str(spec.get("name", spec.get("class_path")))
        class_path = name
        try:
            if "." not in name:
                entry = registry.find(kind, name)
                class_path = entry.class_path
                target = registry.load(entry)
            else:
                target = registry.import_object(name)
        except DistillkitError as error:
            self.problems.append(f"{self._where(path)}: {error}")
            return None, class_path
        except Exception as error:  # importing someone's module may raise anything
            got = f"{type(error).__name__}: {error}"
            hint = f"the name of one that is known: {_names(kind)}"
            self.report(path, f"cannot import {name}", got=got, expected="package.module.Class", hint=hint)
            return None, class_path
        base = BASES[kind]
        if isinstance(target, type):
            if issubclass(target, base) and not inspect.isabstract(target):
                return target, class_path
            other = next((k for k, b in BASES.items() if issubclass(target, b)), None)
            if issubclass(target, base):
                methods = ", ".join(sorted(target.__abstractmethods__))
                what, expected = f"{class_path} is abstract", f"a {kind} that defines {methods}"
            else:
                what = f"{class_path} is a {other}, not a {kind}" if other else f"{class_path} is not a {kind}"
                expected = f"a subclass of {base.__module__}.{base.__name__}"
            self.report(path, what, got=name, expected=expected)
            return None, class_path
        if callable(target) and (kind == "reward" or _makes(target, kind)):
            return target, class_path
        got = f"a {type(target).__name__}"
        self.report(path, f"{class_path} is not a {kind} class", got=got, expected=f"a subclass of {base.__name__}")
        return None, class_path

    def _check_schedule(self, target: Callable[..., Any], args: Mapping[str, Any], path: KeyPath) -> None:
        """Report what a schedule says against its numbers, in the place of the number: it may stand in several."""
        text = refusal(target, args)
        if text is None:
            return
        head = text.partition("\n")[0]
        name = head.removeprefix(f"{getattr(target, '__name__', '')}.")
        if name in args:
            self.problems.append(self._where((*path, name)) + text.removeprefix(head))
        else:
            self.problems.append(f"{self._where(path)}: {text}")

    def _own_arguments(self, spec: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """The arguments of a part, written beside its name or under `init_args`."""
        beside = {str(key): value for key, value in spec.items() if key not in _FORM}
        nested = spec.get("init_args") or {}
        if not isinstance(nested, Mapping):
            self.report(
                (*path, "init_args"), "init_args is not a mapping", got=repr(nested), expected="argument: value"
            )
            return beside
        for name in beside.keys() & nested.keys():
            self.report((*path, name), f"{name!r} stands beside class_path and under init_args", expected="it once")
        return {**nested, **beside}

    def _function_arguments(
        self, function: Callable[..., Any], dotted_path: str, args: Mapping[str, Any], path: KeyPath
    ) -> dict[str, Any]:
        """The arguments of the reward that wraps `function`: what is not its own goes to the function."""
        own = arguments_of(registry.import_object(_FUNCTION_REWARD)).keys() - {"function"}
        extra = {name: value for name, value in args.items() if name not in own}
        parameters = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            known = [*sorted(own), *parameters]
            for name in extra.keys() - parameters.keys():
                what = f"the function {dotted_path} has no argument {name!r}"
                hint = did_you_mean(name, known)
                self.report((*path, name), what, got=name, expected=", ".join(known), hint=hint)
        wrapped = {"function": dotted_path} | {name: value for name, value in args.items() if name in own}
        if extra:
            wrapped["kwargs"] = {**(args.get("kwargs") or {}), **extra}
        return wrapped

    def _places(self, path: KeyPath) -> Callable[[str | None], str]:
        return lambda name: self._where((*path, name) if name else path)

    def _expanded(self, offered: tuple[Slot, ...], value: Any, path: KeyPath) -> Any:
        """Expand what stands in a slot, a list of slots or a mapping of slots."""
        value = plain(value) if isinstance(value, Raw) else value
        slot = _choose(offered, value)
        if value is None:
            return None
        if slot.shape == "list":
            if isinstance(value, list):
                return [self._one(slot, item, (*path, i)) for i, item in enumerate(value)]
            return [self._one(slot, value, path)] if slot.kind else value
        if slot.shape == "mapping" and isinstance(value, Mapping):
            flat = _flattened(value) if slot.kind else value
            return {key: self._one(slot, item, (*path, key)) for key, item in flat.items()}
        return self._one(slot, value, path)

    def _check_classes(self, value: Any, path: KeyPath) -> None:
        """Check the arguments of classes that are no parts: optimizers, callbacks, loggers."""
        if isinstance(value, list):
            for i, item in enumerate(value):
                self._check_classes(item, (*path, i))
        elif isinstance(value, Mapping) and "." in str(value.get("class_path", "")):
            given = value.get("init_args") or {}
            try:
                target = registry.import_object(str(value["class_path"]))
            except Exception as error:  # importing someone's module may raise anything
                got = f"{type(error).__name__}: {error}"
                self.report(path, f"cannot import {value['class_path']}", got=got, expected="package.module.Class")
                return
            if isinstance(target, type) and isinstance(given, Mapping):
                self.problems += problems(target, given, self._places(path), partial=True)

    def _one(self, slot: Slot, value: Any, path: KeyPath) -> Any:
        if slot.kind is not None:
            return self.slot(slot.kind, value, path)
        if slot.settings is not None and isinstance(value, Mapping):
            return self.arguments(slot.settings, value, path)
        return value


def _choose(offered: tuple[Slot, ...], value: Any) -> Slot:
    """Return the branch of a union that `value` has the shape of."""
    by_shape = {slot.shape: slot for slot in reversed(offered)}
    if isinstance(value, list) and "list" in by_shape:
        return by_shape["list"]
    if isinstance(value, Mapping) and "mapping" in by_shape:
        one = by_shape.get("one")
        keys = _fields(one.settings) if one and one.settings else _FORM if one else frozenset()
        return one if one is not None and keys & value.keys() else by_shape["mapping"]
    return by_shape.get("one", offered[0])


def _fields(settings: type[Any]) -> frozenset[str]:
    return frozenset(settings.__dataclass_fields__)


def _flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{sampler: {temperature: v}}` as `{sampler.temperature: v}`; a mapping that names a part is a value."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item and not {"name", "class_path"} & item.keys():
            flat |= _flattened(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _class_form(value: Any) -> Any:
    """Put arguments that stand beside a `class_path` (of an optimizer, a callback) under `init_args`."""
    if isinstance(value, list):
        return [_class_form(item) for item in value]
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    beside = {key: _class_form(item) for key, item in value.items() if key not in _CLASS_FORM}
    if not beside:
        return value
    rest = {key: item for key, item in value.items() if key in _CLASS_FORM}
    return rest | {"init_args": {**(value.get("init_args") or {}), **beside}}


def _makes(function: Any, kind: str) -> bool:
    """Whether a function says that it returns a part of `kind`."""
    try:
        made = inspect.get_annotations(function, eval_str=True).get("return")
    except Exception:  # annotations are arbitrary expressions
        return False
    return isinstance(made, type) and issubclass(made, BASES[kind])


def _names(kind: str) -> str:
    return registry.describe_known(kind)
