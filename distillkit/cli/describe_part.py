"""What a part's class says of itself: the text behind `distillkit components KIND NAME`."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import docstring_parser
import yaml

from distillkit.cli.arguments import Argument, arguments_of, hint_text
from distillkit.registry import Entry
from distillkit.types import ScoreRequest

__all__ = ["description"]

_ASKED = {
    "sampled": "sampled log-probs",
    "topk": "log-probs of the teacher's {} most likely tokens",
    "student_topk": "log-probs at the student's {} most likely tokens",
    "full": "whole distributions",
    "entropy": "entropies",
}


def description(entry: Entry, part: type[Any]) -> dict[str, Any]:
    """Return what `distillkit components KIND NAME` shows: summary, sources, arguments, needs, a YAML line."""
    text = inspect.getdoc(part) or ""
    own = docstring_parser.parse(text)
    helps: dict[str, str] = {}
    for cls in part.__mro__:
        if cls is not object and cls.__doc__:
            for found in docstring_parser.parse(inspect.cleandoc(cls.__doc__)).params:
                helps.setdefault(found.arg_name, " ".join((found.description or "").split()))
    arguments = arguments_of(part)
    return {
        "summary": " ".join((own.short_description or "").split()),
        "source": [" ".join(match.split()) for match in re.findall(r"^See ((?:.+\n?)+)", text, flags=re.MULTILINE)],
        "args": [
            {
                "name": name,
                "type": hint_text(argument.hint),
                "required": argument.required,
                "default": None if argument.required else argument.default,
                "help": helps.get(name, ""),
            }
            for name, argument in arguments.items()
        ],
        "needs": _needs(part, arguments),
        "yaml": _yaml_line(entry, arguments),
    }


def _needs(part: type[Any], arguments: dict[str, Argument]) -> str:
    """The scores a part asks for when it is built with its defaults."""
    if not hasattr(part, "needs"):
        return ""
    asked = part.needs
    if not isinstance(asked, ScoreRequest):
        if any(argument.required for argument in arguments.values()):
            return ""
        asked = part().needs
    given = {field.name: getattr(asked, field.name) for field in fields(asked)}
    words = [text.format(given[name]) for name, text in _ASKED.items() if given[name]]
    return f"teacher scores: {', '.join(words)}" if words else ""


def _yaml_line(entry: Entry, arguments: dict[str, Argument]) -> str:
    shown: dict[str, Any] = {"name": entry.name}
    for name, argument in arguments.items():
        if argument.required:
            shown[name] = "..."
    for name, argument in arguments.items():
        if len(shown) < 2 and not argument.required and argument.default is not None:
            shown[name] = argument.default
    value: Any = entry.name if len(shown) == 1 else shown
    line = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("\n...\n").strip()
    return f"rewards: [{line}]" if entry.kind == "reward" else f"{entry.kind}: {line}"
