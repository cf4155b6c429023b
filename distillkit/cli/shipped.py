"""The recipes that come with distillkit: found by name, listed, copied."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import distillkit
from distillkit.errors import ConfigError, did_you_mean, problem

__all__ = ["find_config", "main", "recipe_summary", "recipes", "recipes_folder"]

_SUFFIXES = (".yaml", ".yml", ".json")


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside the package when installed, beside it in a source tree."""
    package = Path(distillkit.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """Return name -> file of the shipped recipes; one in a sub-folder is called `folder/name`."""
    folder = recipes_folder()
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """Return the first line of a recipe's header comment."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def find_config(text: str) -> Path:
    """Return the file that `--config text` means: a path, or the name of a shipped recipe.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return path
    known = recipes()
    name = text.removesuffix(".yaml").removeprefix("configs/")
    if name in known and (Path(text).suffix != ".yaml" or text.startswith("configs/")):
        return known[name]
    if path.is_dir():
        where, got = f"--config: {text} is a folder", None
    elif path.suffix in _SUFFIXES or path.parent != Path("."):
        where, got = f"--config: no file {text}", str(path.absolute())
    else:
        where, got = f"--config: no file and no recipe {text!r}", repr(text)
    near = did_you_mean(name, known)
    raise ConfigError(
        problem(
            where,
            got=got,
            expected=f"a YAML file, or one of the recipes {', '.join(known) or '(none)'}",
            hint=f"--config {near}" if near else "distillkit configs, which lists the recipes",
        )
    )


def main(argv: Sequence[str]) -> int:
    """Run `distillkit configs [NAME] [--copy [DEST]]`."""
    parser = argparse.ArgumentParser(
        prog="distillkit configs", description="List the recipes that come with distillkit, print one, or copy it."
    )
    parser.add_argument("name", nargs="?", help="a recipe; without it, all of them are listed")
    parser.add_argument(
        "--copy", nargs="?", const="", metavar="DEST", help="write it to DEST (default: here, under its own name)"
    )
    options = parser.parse_args(list(argv))
    known = recipes()
    if options.name is None:
        if options.copy is not None:
            raise ConfigError(
                problem("distillkit configs --copy: which recipe?", expected=f"a name: {', '.join(known)}")
            )
        width = max((len(name) for name in known), default=0)
        for name, path in known.items():
            print(f"{name:<{width}}  {recipe_summary(path)}".rstrip())
        return 0
    if options.name not in known:
        near = did_you_mean(options.name, known)
        raise ConfigError(
            problem(
                f"distillkit configs: no recipe {options.name!r}",
                got=repr(options.name),
                expected=", ".join(known) or "(none)",
                hint=near,
            )
        )
    text = known[options.name].read_text(encoding="utf-8")
    if options.copy is None:
        sys.stdout.write(text)
        return 0
    target = Path(options.copy or ".").expanduser()
    if target.is_dir():
        target = target / known[options.name].name
    if target.exists():
        raise ConfigError(
            problem(
                f"distillkit configs: {target} exists already",
                expected="a new file",
                hint=f"--copy another-{target.name}",
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"{target}")
    return 0
