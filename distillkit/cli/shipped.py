"""The recipes that come with distillkit: found by name, listed, copied."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import distillkit
from distillkit.errors import ConfigError, did_you_mean, problem

__all__ = ["find_config", "main", "recipe_summary", "recipes", "recipes_folder", "run_name"]

_SUFFIXES = (".yaml", ".yml", ".json")


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside the package when installed, beside it in a source tree."""
    package = Path(distillkit.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """Return name -> file of the shipped recipes, folder by folder; one in a sub-folder is called `folder/name`."""
    folder = recipes_folder()
    named = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}
    return {name: named[name] for name in sorted(named, key=lambda name: (_folder(name), name))}


def run_name(path: Path) -> str:
    """Return what a run of a config is called: the file's name, with its folder's for a recipe in a sub-folder.

    `small/grpo` runs in `runs/small-grpo`, beside the runs of other recipes and not in a folder among them.
    """
    here, folder = path.resolve(), recipes_folder().resolve()
    return "-".join(
        (here.relative_to(folder) if here.is_relative_to(folder) else Path(here.name)).with_suffix("").parts
    )


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
    folders = {_folder(other) for other in known}
    if path.is_dir():
        where, got = f"--config: {text} is a folder", None
    elif path.suffix in _SUFFIXES or (path.parent != Path(".") and _folder(name) not in folders):
        where, got = f"--config: no file {text}", str(path.absolute())
    else:
        where, got = f"--config: no file and no recipe {text!r}", repr(text)
    near = _nearest(name, known)
    raise ConfigError(
        problem(
            where,
            got=got,
            expected=f"a YAML file, or one of the recipes {_listed(name, known)}",
            hint=f"--config {near}" if near else "distillkit configs, which lists the recipes",
        )
    )


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The recipe that was meant: of that name in whatever folder, else of a similar one."""
    names = list(known)
    last = {other: other.rpartition("/")[2] for other in names}
    own = name.rpartition("/")[2]
    if same := [other for other in names if last[other] == own]:
        return " or ".join(same[:3])
    if whole := did_you_mean(name, names):
        return whole
    near = difflib.get_close_matches(own, list(last.values()), n=1, cutoff=0.75)
    return next((other for other in names if last[other] in near), None)


def _listed(name: str, known: Iterable[str]) -> str:
    """The recipes of the folder that `name` stands in, then how many each other folder has."""
    names = list(known)
    here = _folder(name) if any(_folder(other) == _folder(name) for other in names) else ""
    count = Counter(_folder(other) for other in names if _folder(other) != here)
    others = [
        f"{folder}/... ({number})" if folder else f"{number} without a folder" for folder, number in count.items()
    ]
    return ", ".join([*(other for other in names if _folder(other) == here), *others]) or "(none)"


def main(argv: Sequence[str]) -> int:
    """Run `distillkit configs [NAME] [--copy [DEST]]`."""
    parser = argparse.ArgumentParser(
        prog="distillkit configs", description="List the recipes that come with distillkit, print one, or copy it."
    )
    parser.add_argument("name", nargs="?", help="a recipe, or a folder of them; without it, all of them are listed")
    parser.add_argument(
        "--copy", nargs="?", const="", metavar="DEST", help="write it to DEST (default: here, under its own name)"
    )
    options = parser.parse_args(list(argv))
    known = recipes()
    asked = None if options.name is None else options.name.removesuffix("/")
    group = known if asked is None else {n: p for n, p in known.items() if n.startswith(f"{asked}/")}
    if asked is None or (group and asked not in known):
        if options.copy is not None:
            where = "distillkit configs --copy: which recipe?"
            raise ConfigError(problem(where, expected=f"a name: {_listed(f'{asked}/', known)}"))
        _print_list(group)
        return 0
    if asked not in known:
        raise ConfigError(
            problem(
                f"distillkit configs: no recipe {asked!r}",
                got=repr(asked),
                expected=_listed(asked, known),
                hint=_nearest(asked, known),
            )
        )
    text = known[asked].read_text(encoding="utf-8")
    if options.copy is None:
        sys.stdout.write(text)
        return 0
    target = Path(options.copy or ".").expanduser()
    if target.is_dir():
        target = target / known[asked].name
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


def _print_list(group: Mapping[str, Path]) -> None:
    """One line per recipe, a blank line between folders."""
    width = max((len(name) for name in group), default=0)
    before = None
    for name, path in group.items():
        if before not in (None, _folder(name)):
            print()
        before = _folder(name)
        print(f"{name:<{width}}  {recipe_summary(path)}".rstrip())
