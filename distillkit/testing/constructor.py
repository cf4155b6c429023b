"""Rules that every part keeps, whatever its slot."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from distillkit.components import Component
from distillkit.testing.findings import Findings

__all__ = ["check_common", "constructor_problems", "required_arguments"]


def _parameters(cls: type) -> list[inspect.Parameter]:
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return []
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]


def required_arguments(cls: type) -> list[str]:
    """Return the constructor arguments without a default."""
    return [p.name for p in _parameters(cls) if p.default is p.empty and p.kind is p.KEYWORD_ONLY]


def constructor_problems(cls: type[Component]) -> list[str]:
    """Return what is wrong with a part's class: it is a YAML key's schema and its documentation."""
    problems = []
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        problems.append(f"is abstract: {missing} not implemented")
    if not (cls.__doc__ or "").strip():
        problems.append("has no docstring")
    docs = [inspect.getdoc(c) or "" for c in cls.__mro__ if c.__module__ != "builtins"]
    for parameter in _parameters(cls):
        name = parameter.name
        if parameter.kind is not parameter.KEYWORD_ONLY:
            problems.append(f"constructor argument {name!r} is not keyword-only")
        if parameter.annotation is parameter.empty:
            problems.append(f"constructor argument {name!r} has no type")
        if name == "name":
            problems.append("constructor argument 'name' is reserved")
        if not any(re.search(rf"^\s+{re.escape(name)}(\s*\(.*\))?: \S", doc, re.MULTILINE) for doc in docs):
            problems.append(f"constructor argument {name!r} is not documented under Args")
        if parameter.default is not parameter.empty and not _is_json(parameter.default):
            problems.append(f"the default of constructor argument {name!r} is not JSON: {parameter.default!r}")
    return problems


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def check_common(findings: Findings, part: Component) -> None:
    """Check the class, and that `at` gives a changed copy and leaves the part as it is."""
    findings.failures += constructor_problems(type(part))
    numbers = {k: v for k, v in vars(part).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for name, value in numbers.items():
        with findings.rule(f"at({{{name!r}: ...}})"):
            changed = part.at({name: value + 1})
            findings.expect(getattr(part, name) == value, f"at() changes the part itself: {name}")
            findings.expect(changed is not part and getattr(changed, name) == value + 1, f"at() does not set {name}")
    with findings.rule("at({})"):
        findings.expect(isinstance(part.at({}), type(part)), "at({}) returns something else")
