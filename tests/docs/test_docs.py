"""What README and docs show is run: code, configs, commands, the notebook."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from distillkit.cli.main import main
from distillkit.cli.shipped import recipes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


COMMANDS = [line for b in blocks(README, "bash") for line in b.splitlines() if not line.endswith("tox")]
"""Every command that the README shows, but for tox, which runs this very test."""


def test_the_readmes_config_is_the_quickstart() -> None:
    shown = yaml.safe_load(next(b for b in blocks(README, "yaml") if "seed_everything" in b))
    shipped = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    assert _without_nulls(shown) == _without_nulls(shipped)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_readmes_commands_run(command: str, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    start = words.index("distillkit")
    words = words[start + 1 :]
    short = ["--trainer.max_steps", "2", "--data.val.0.source.limit", "4", "--trainer.val_check_interval", "2"]
    if words[0] == "fit" and "--ckpt_path" in words:
        _distillkit(tmp_path, ["fit", "--config", "quickstart", *short])
        (tmp_path / "runs" / "quickstart" / "status.json").write_text(
            (tmp_path / "runs" / "quickstart" / "status.json").read_text().replace("finished", "stopped")
        )
        short[1] = "3"
    if words[0] == "rollouts":
        _distillkit(tmp_path, ["fit", "--config", "quickstart", *short])
    if words[0] == "compare":
        for run in (word for word in words if word.startswith("runs/")):
            _distillkit(tmp_path, ["fit", "--config", "quickstart", "--run_dir", run, *short])
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    _distillkit(tmp_path, [*words, *(short if words[0] == "fit" else [])])


def _distillkit(folder: Path, words: list[str]) -> str:
    command = [sys.executable, "-m", "distillkit", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "runs" / "python" / "student" / "model.safetensors").exists()


def test_the_parts_of_the_how_to_pass_their_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = blocks((ROOT / "docs" / "writing_parts.md").read_text(), "python")
    scope: dict[str, Any] = {"__name__": "howto"}
    for block in shown:
        exec(compile(block, "writing_parts.md", "exec"), scope)
    assert scope["short"](["a" * 300, "b"]) == [0.0, 1.0]


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert errors == []


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_says_what_it_is_and_how_to_run_it(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "configs" / f"{recipe}.yaml").read_text()
    header = text.split("\n\n")[0].split("seed_everything")[0]
    assert header.startswith("# ")
    assert f"distillkit fit --config {recipe}" in header
    assert main(["configs", recipe]) == 0
    assert capsys.readouterr().out == text
