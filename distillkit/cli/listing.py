"""`distillkit components`: which parts there are, what one takes, whether they all load.

The listing reads source files and package metadata; only `--check` and a single part import anything.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from distillkit import registry
from distillkit.errors import DistillkitError
from distillkit.registry import Entry

__all__ = ["main", "summary"]


def main(argv: Sequence[str]) -> int:
    """Run `distillkit components [kind [name]] [--json] [--check] [--plugins-only]`."""
    parser = argparse.ArgumentParser(
        prog="distillkit components",
        description="List the parts a config can name, in the order of the step; with a name, describe one.",
    )
    parser.add_argument("kind", nargs="?", help=", ".join(registry.KINDS))
    parser.add_argument("name", nargs="?", help="one part of that kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="load every part and test its contract; exit 1 on failure")
    parser.add_argument("--plugins-only", action="store_true", help="leave out what distillkit itself offers")
    options = parser.parse_args(list(argv))
    if options.name is not None and not options.check:
        print(_described(registry.find(options.kind, options.name), as_json=options.json))
        return 0
    found = registry.entries(options.kind)
    if options.plugins_only:
        found = [entry for entry in found if not entry.built_in]
    if options.name is not None:
        found = [entry for entry in found if entry.name == options.name] or [registry.find(options.kind, options.name)]
    failures = {entry: _failure(entry) for entry in found} if options.check else {}
    if options.json:
        print(json.dumps([_row(entry, failures) for entry in found], indent=2, ensure_ascii=False))
    else:
        print(_table(found, failures, with_summary=options.kind is not None))
    return 1 if any(failures.values()) else 0


def summary(class_path: str) -> str:
    """Return the first docstring line of a class, read from its source file; empty where that cannot be found.

    Example:
        >>> summary("distillkit.registry.Entry")
        'One named part: `class_path` is importable; `distribution` and `version` say which package offers it.'
    """
    module, _, name = class_path.rpartition(".")
    spec = _find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n", 1)[0]
    return ""


def _find_spec(module: str) -> ModuleSpec | None:
    """Find a module's file as an import would, but without importing the packages above it."""
    path: Iterable[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        search = list(path) if path is not None else None
        spec = next((s for finder in finders if (s := finder.find_spec(name, search, None)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _table(found: Sequence[Entry], failures: dict[Entry, str], *, with_summary: bool) -> str:
    rows = [("KIND", "NAME", "FROM", "CLASS")] + [(e.kind, e.name, e.source, e.class_path) for e in found]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    doubled = registry.clashes()
    for i, entry in enumerate(found, start=1):
        if failure := failures.get(entry):
            lines[i] += f"  BROKEN  {failure}"
        elif (entry.kind, entry.name) in doubled:
            lines[i] += "  CLASH  give its class_path"
        elif with_summary and (text := summary(entry.class_path)):
            lines[i] += f"  {text}"
        elif failures:
            lines[i] += "  ok"
    return "\n".join(lines)


def _row(entry: Entry, failures: dict[Entry, str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version or importlib.import_module("distillkit").__version__,
        "class_path": entry.class_path,
        "summary": summary(entry.class_path),
    }
    if entry in failures:
        row["broken"] = failures[entry] or None
    return row


def _failure(entry: Entry) -> str:
    """Why a part cannot be used, in one line; empty when it can."""
    if not registry.NAME.fullmatch(entry.name):
        return f"the name {entry.name!r} is not lower-case letters, digits and _"
    if others := [e.source for e in registry.clashes().get((entry.kind, entry.name), []) if e != entry]:
        return f"the name is also used by {', '.join(others)}"
    try:
        found = registry.load(entry)
    except DistillkitError as error:
        cause = error.__cause__
        return f"{type(cause).__name__}: {cause}" if cause else str(error).split("\n", 1)[0]
    from distillkit.testing import ConformanceError, check_class

    try:
        check_class(entry.kind, found)
    except ConformanceError as error:
        return " ".join(str(error).split())
    return ""


def _described(entry: Entry, *, as_json: bool) -> str:
    from distillkit.cli.describe_part import description

    facts = description(entry, registry.load(entry))
    if as_json:
        return json.dumps(_row(entry, {}) | facts, indent=2, ensure_ascii=False)
    lines = [f"{entry.name} — {facts['summary']}" if facts["summary"] else entry.name]
    fields: list[tuple[str, Sequence[str]]] = [
        ("class", [entry.class_path]),
        ("from", [] if entry.built_in else [entry.source]),
        ("source", facts["source"]),
        ("args", _aligned(facts["args"])),
        ("needs", [facts["needs"]] if facts["needs"] else []),
        ("yaml", [facts["yaml"]]),
    ]
    for label, texts in fields:
        for i, text in enumerate(texts):
            lines.append(f"  {label if i == 0 else '':<7} {text}".rstrip())
    return "\n".join(lines)


def _aligned(arguments: Sequence[dict[str, Any]]) -> list[str]:
    heads = [
        f"{a['name']}: {a['type']}" + ("" if a["required"] else f" = {json.dumps(a['default'])}") for a in arguments
    ]
    width = max((len(head) for head in heads if len(head) <= 48), default=0)
    return [f"{head:<{width}}  {a['help']}".rstrip() for head, a in zip(heads, arguments, strict=True)]
