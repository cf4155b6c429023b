"""`distillkit plot`, and what takes the place of pictures where matplotlib is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distillkit.cli.main import main
from distillkit.reporting.drawing import can_draw
from tests.reporting.made_runs import config, make_run


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("plots", "compare_plot"):
        monkeypatch.delitem(sys.modules, f"distillkit.reporting.{name}", raising=False)
    assert not can_draw()


@pytest.fixture
def runs() -> list[str]:
    make_run("a", {0: [[True]], 3: [[True]]}, settings=config(1), name="kdrl")
    make_run("b", {0: [[True]], 3: [[False]]}, settings=config(1, 0.0), name="grpo")
    return ["a", "b"]


def test_it_draws_each_run_from_its_metrics(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("b/metrics.csv").write_text("step,train/other\n1,0.5\n")
    assert main(["plot", *runs]) == 0
    assert capsys.readouterr().out == "a/plots: reward.png, accuracy.png\nb/plots: nothing to draw yet\n"
    assert sorted(path.name for path in Path("a/plots").iterdir()) == ["accuracy.png", "reward.png"]


def test_a_folder_without_metrics_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "nowhere"]) == 2
    assert "nowhere/metrics.csv" in capsys.readouterr().err


def test_without_matplotlib_it_says_how_to_get_it(
    runs: list[str], no_matplotlib: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", *runs]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit plot: matplotlib is not installed\n    try:      pip install 'distillkit[plots]'\n"
    )


def test_without_matplotlib_a_comparison_has_no_picture(
    runs: list[str], no_matplotlib: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *runs]) == 0
    said = capsys.readouterr().out
    assert said.endswith("Written: compare/compare.md; for a picture of it: pip install 'distillkit[plots]'\n")
    assert [path.name for path in Path("compare").iterdir()] == ["compare.md"]
    page = Path("compare/compare.md").read_text()
    assert page.startswith("# kdrl · grpo\n") and "![" not in page


def test_without_matplotlib_a_run_ends_with_its_student_and_says_so(
    no_matplotlib: None, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--trainer.max_steps", "1", "--model.sampler.max_new_tokens", "4", "--model.validate_at_start", "false"]
    few += ["--data.prompts_per_step", "2", "--data.val", "[]", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "quickstart", "--run_dir", "run", *few]) == 0
    said = capsys.readouterr().out.splitlines()
    line = "No curves are drawn, as matplotlib is not installed. For them: pip install 'distillkit[plots]'"
    assert f"{line} && distillkit plot run" in said and said[-1].startswith("Done")
    assert Path("run/student/model.safetensors").is_file() and not Path("run/plots").exists()
