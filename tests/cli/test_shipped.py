"""`distillkit configs`: what is listed, printed, copied; recipes that ship parse."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillkit.cli import shipped
from distillkit.cli.canonical import canonical, slot_test
from distillkit.cli.main import main
from distillkit.cli.recipe import read_recipe
from distillkit.data import PromptData
from distillkit.errors import ConfigError
from distillkit.training.base import StudentModule
from distillkit.training.on_policy import OnPolicyDistillation


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "package" / "configs"
    (folder / "papers").mkdir(parents=True)
    (folder / "quick.yaml").write_text("# Two minutes on a laptop.\n# More.\nmodel: {}\n")
    (folder / "papers" / "kdrl.yaml").write_text("model: {}\n")
    (folder / "README.md").write_text("not a recipe")
    monkeypatch.setattr(shipped, "recipes_folder", lambda: folder)
    return folder


def test_recipes_are_listed_with_their_first_comment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    assert capsys.readouterr().out == "papers/kdrl\nquick        Two minutes on a laptop.\n"


def test_a_recipe_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "papers/kdrl"]) == 0
    assert capsys.readouterr().out == "model: {}\n"


@pytest.mark.parametrize(
    ("argv", "written"), [([], "quick.yaml"), (["mine.yaml"], "mine.yaml"), (["there"], "there/quick.yaml")]
)
def test_a_recipe_is_copied_once(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], written: str
) -> None:
    Path("there").mkdir()
    assert main(["configs", "quick", "--copy", *argv]) == 0
    assert capsys.readouterr().out == f"{written}\n"
    assert Path(written).read_text() == (folder / "quick.yaml").read_text()
    Path(written).write_text("mine")
    assert main(["configs", "quick", "--copy", *argv]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: distillkit configs: {written} exists already\n"
        "    expected: a new file\n"
        f"    try:      --copy another-{Path(written).name}\n"
    )
    assert Path(written).read_text() == "mine"


def test_an_unknown_recipe_is_told_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "quik"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit configs: no recipe 'quik'\n"
        "    got:      'quik'\n"
        "    expected: papers/kdrl, quick\n"
        "    try:      quick\n"
    )
    assert main(["configs", "--copy"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit configs --copy: which recipe?\n    expected: a name: papers/kdrl, quick\n"
    )


def test_a_config_is_a_file_or_a_recipe(folder: Path) -> None:
    assert shipped.find_config("quick") == folder / "quick.yaml"
    assert shipped.find_config("papers/kdrl") == folder / "papers" / "kdrl.yaml"
    assert shipped.find_config("configs/quick.yaml") == folder / "quick.yaml"
    Path("quick").write_text("model: {}\n")
    assert shipped.find_config("quick") == Path("quick")
    with pytest.raises(ConfigError, match=r"no file and no recipe 'quack'"):
        shipped.find_config("quack")
    with pytest.raises(ConfigError, match=r"no file quick\.yaml"):
        shipped.find_config("quick.yaml")


def test_recipes_are_found_in_the_package_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "distillkit"
    package.mkdir(parents=True)
    monkeypatch.setattr(shipped.distillkit, "__file__", str(package / "__init__.py"))
    assert shipped.recipes_folder() == tmp_path / "site" / "configs"
    (package / "configs").mkdir()
    assert shipped.recipes_folder() == package / "configs"


def test_every_recipe_that_ships_says_what_it_is() -> None:
    found = shipped.recipes()
    assert found
    assert [name for name, path in found.items() if not shipped.recipe_summary(path)] == []


@pytest.mark.parametrize("name", shipped.recipes())
def test_every_recipe_that_ships_parses_with_the_real_module(name: str) -> None:
    argv = ["--config", name, "--model.student", "any"]
    recipe = read_recipe("fit", argv, lambda tree: slot_test(tree, OnPolicyDistillation))
    expanded = canonical(
        recipe, "fit", default_model=OnPolicyDistillation, default_data=PromptData, refused=lambda *_: iter(())
    )
    assert issubclass(expanded.model, StudentModule)
    assert expanded.tree["trainer"]["max_steps"] > 0
