"""`distillkit configs`: what is listed, printed, copied; recipes that ship parse."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillkit.cli import shipped
from distillkit.cli.canonical import canonical, slots_of
from distillkit.cli.main import main
from distillkit.cli.recipe import read_recipe
from distillkit.data import PromptData
from distillkit.errors import ConfigError
from distillkit.training.base import StudentModule
from distillkit.training.on_policy import OnPolicyDistillation


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "package" / "configs"
    (folder / "papers" / "more").mkdir(parents=True)
    (folder / "quick.yaml").write_text("# Two minutes on a laptop.\n# More.\nmodel: {}\n")
    (folder / "papers" / "kdrl.yaml").write_text("model: {}\n")
    (folder / "papers" / "more" / "top_k.yaml").write_text("# Deep.\nmodel: {}\n")
    (folder / "README.md").write_text("not a recipe")
    monkeypatch.setattr(shipped, "recipes_folder", lambda: folder)
    return folder


def test_recipes_are_listed_with_their_first_comment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    assert capsys.readouterr().out == (
        "quick              Two minutes on a laptop.\n\npapers/kdrl\n\npapers/more/top_k  Deep.\n"
    )


@pytest.mark.parametrize("asked", ["papers/more", "papers/more/"])
def test_a_folder_of_recipes_is_listed(folder: Path, capsys: pytest.CaptureFixture[str], asked: str) -> None:
    assert main(["configs", asked]) == 0
    assert capsys.readouterr().out == "papers/more/top_k  Deep.\n"
    assert main(["configs", asked, "--copy"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit configs --copy: which recipe?\n"
        "    expected: a name: papers/more/top_k, 1 without a folder, papers/... (1)\n"
    )


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


UNKNOWN = {
    "quik": ("quick, papers/... (1), papers/more/... (1)", "quick"),
    "papers/kdlr": ("papers/kdrl, 1 without a folder, papers/more/... (1)", "papers/kdrl"),
    "kdrl": ("quick, papers/... (1), papers/more/... (1)", "papers/kdrl"),
    "papers/more/quick": ("papers/more/top_k, 1 without a folder, papers/... (1)", "quick"),
    "topk": ("quick, papers/... (1), papers/more/... (1)", "papers/more/top_k"),
}


@pytest.mark.parametrize("asked", UNKNOWN)
def test_an_unknown_recipe_is_told_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str], asked: str) -> None:
    listed, near = UNKNOWN[asked]
    assert main(["configs", asked]) == 2
    said = f"    got:      {asked!r}\n    expected: {{}}{listed}\n    try:      {{}}{near}\n"
    assert capsys.readouterr().err == f"ConfigError: distillkit configs: no recipe {asked!r}\n" + said.format("", "")
    assert main(["fit", "--config", asked]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: --config: no file and no recipe {asked!r}\n"
        + said.format("a YAML file, or one of the recipes ", "--config ")
    )


def test_copy_needs_a_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "--copy"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit configs --copy: which recipe?\n"
        "    expected: a name: quick, papers/... (1), papers/more/... (1)\n"
    )


def test_a_recipe_of_a_folder_is_copied_under_its_own_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "papers/more/top_k", "--copy"]) == 0
    assert capsys.readouterr().out == "top_k.yaml\n"
    assert Path("top_k.yaml").read_text() == (folder / "papers" / "more" / "top_k.yaml").read_text()


def test_a_run_is_called_after_its_recipe_and_folder(folder: Path) -> None:
    Path("mine").mkdir()
    Path("mine/own.yaml").write_text("model: {}\n")
    names = {text: shipped.run_name(shipped.find_config(text)) for text in ("quick", "papers/kdrl", "mine/own.yaml")}
    assert names == {"quick": "quick", "papers/kdrl": "papers-kdrl", "mine/own.yaml": "own"}
    assert shipped.run_name(folder / "papers" / "more" / "top_k.yaml") == "papers-more-top_k"
    assert shipped.run_name(folder / "papers" / ".." / "quick.yaml") == "quick"


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
    with pytest.raises(ConfigError, match=r"no file elsewhere/quick\n"):
        shipped.find_config("elsewhere/quick")


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
    recipe = read_recipe("fit", argv, lambda tree: slots_of(tree, OnPolicyDistillation))
    expanded = canonical(
        recipe, "fit", default_model=OnPolicyDistillation, default_data=PromptData, refused=lambda *_: iter(())
    )
    assert issubclass(expanded.model, StudentModule)
    assert expanded.tree["trainer"]["max_steps"] > 0
