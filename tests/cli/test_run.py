"""Whole runs of a small module: what the run folder holds, continuing, interruptions, loggers."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import distillkit
from distillkit.cli.lightning import RunInterrupted
from distillkit.errors import ConfigError
from distillkit.reporting.run_folder import RunFolder
from tests.cli.stand_ins import CLI

RECIPE = """\
# a recipe
model:
  student: x   # the student
  divergence: k2
  beta: 0.1
data: {rows: 20}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture(autouse=True)
def _recipe() -> None:
    Path("tiny.yaml").write_text(RECIPE)


def fit(*argv: str) -> CLI:
    return CLI(["fit", "--config", "tiny.yaml", *argv])


def state(folder: str) -> str:
    status = RunFolder(Path(folder)).status()
    assert status is not None
    return status.state


def step(folder: str) -> int:
    loaded = torch.load(RunFolder(Path(folder)).last_ckpt, weights_only=True)
    return int(loaded["global_step"])


def test_a_run_leaves_recipe_config_environment_status_metrics_and_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli = fit()
    run = RunFolder(Path("runs/tiny"))
    assert capsys.readouterr().out == "run folder: runs/tiny\n"
    assert cli.model.run_folder == run
    assert cli.trainer.default_root_dir == str(run.path)
    assert run.recipe_yaml.read_text() == RECIPE
    assert state("runs/tiny") == "finished"
    assert step("runs/tiny") == 4
    config = yaml.safe_load(run.config_yaml.read_text())
    assert list(config)[:5] == ["seed_everything", "run_dir", "model", "data", "trainer"]
    assert config["model"]["beta"] == {"class_path": "distillkit.betas.constant.Constant", "init_args": {"value": 0.1}}
    assert (config["seed_everything"], config["run_dir"], config["trainer"]["max_steps"]) == (1, None, 4)
    assert "ckpt_path" not in config
    environment = json.loads(run.environment_json.read_text())
    assert environment["command"] == ["distillkit", "fit", "--config", "tiny.yaml"]
    assert environment["distillkit"]["version"] == distillkit.__version__
    assert environment["libraries"]["torch"] == torch.__version__
    assert (environment["data"], environment["models"]) == ({"data.train": {"content": "def"}}, {"student": "abc"})
    assert "torch" in environment["parts"]
    assert {p.name for p in run.path.iterdir()} == {
        ".lock", "recipe.yaml", "config.yaml", "environment.json", "status.json", "metrics.csv", "checkpoints"
    }  # fmt: skip


def test_recipe_yaml_has_the_overrides_with_the_types_that_the_arguments_have() -> None:
    overrides = ["--model.student", "7", "--model.inner_epochs=2", "--model.beta", "1e-3", "--model.divergence.k=5"]
    fit("--model.divergence=topk", *overrides, "--model.rewards", "[answer]", "--model.optimizer.lr=0.5")
    text = Path("runs/tiny/recipe.yaml").read_text()
    assert text.startswith("# distillkit fit --config tiny.yaml --model.divergence=topk --model.student 7")
    recipe = yaml.safe_load(text)
    assert recipe["model"] == {
        "student": "7",
        "divergence": {"name": "topk", "k": 5},
        "beta": 0.001,
        "inner_epochs": 2,
        "rewards": ["answer"],
        "optimizer": {"lr": 0.5},
    }


@pytest.mark.parametrize("file", ["recipe.yaml", "config.yaml"])
def test_what_a_run_wrote_runs_again_under_its_name(file: str) -> None:
    fit("--model.divergence=topk", "--model.divergence.k=5")
    first = Path("runs/tiny/config.yaml").read_text()
    CLI(["fit", "--config", f"runs/tiny/{file}"])
    assert Path("runs/tiny-2/config.yaml").read_text() == first
    Path("tiny.yaml").unlink()
    CLI(["validate", "--config", f"runs/tiny/{file}", "--ckpt_path", "last"])
    assert state("runs/tiny-validate") == "finished"


def test_a_crashed_run_is_continued_where_its_checkpoint_stands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="broke"):
        fit("--model.crash", "step")
    assert (state("runs/tiny"), step("runs/tiny")) == ("failed", 2)
    before = json.loads(Path("runs/tiny/environment.json").read_text())
    capsys.readouterr()
    fit("--model.crash", "step", "--trainer.max_steps", "2", "--ckpt_path", "last")
    assert capsys.readouterr().out == "continuing runs/tiny\n"
    assert [p.name for p in Path("runs").iterdir()] == ["tiny"]
    assert (state("runs/tiny"), step("runs/tiny")) == ("finished", 2)
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["trainer"]["max_steps"] == 2
    environment = json.loads(Path("runs/tiny/environment.json").read_text())
    (continued,) = environment.pop("continued")
    assert environment == before
    assert continued["command"][-2:] == ["--ckpt_path", "last"]


def test_a_changed_config_is_not_continued() -> None:
    with pytest.raises(RuntimeError):
        fit("--model.crash", "step")
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        fit("--ckpt_path", "last")
    assert str(caught.value).split("\n")[:2] == [
        "--ckpt_path last: the config is not the one that runs/tiny was started with",
        "    got:      model.crash: step -> None",
    ]
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before


def test_a_random_seed_is_kept_when_a_run_is_continued() -> None:
    with pytest.raises(RuntimeError):
        fit("--model.crash", "step", "--seed_everything", "true")
    seed = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["seed_everything"]
    assert type(seed) is int
    fit("--model.crash=step", "--seed_everything=true", "--trainer.max_steps=2", "--ckpt_path=last")
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["seed_everything"] == seed


@pytest.mark.parametrize(("crash", "why"), [("ctrl-c", "Ctrl-C"), ("sigterm", "SIGTERM")])
def test_an_interrupted_run_says_how_to_go_on(crash: str, why: str) -> None:
    with pytest.raises(RunInterrupted) as caught:
        fit("--model.crash", crash)
    assert str(caught.value) == (
        f"stopped by {why}; runs/tiny has last.ckpt. The same command with --ckpt_path last goes on."
    )
    assert state("runs/tiny") == "stopped"


def test_a_run_whose_time_is_up_can_be_continued() -> None:
    fit("--trainer.max_time", "00:00:00:00", "--trainer.max_steps", "4")
    status = RunFolder(Path("runs/tiny")).status()
    assert status is not None
    assert (status.state, status.reason) == ("stopped", "trainer.max_time")


def test_an_explicit_folder_that_exists_is_refused_before_anything_is_written() -> None:
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match="run_dir: mine exists already"):
        fit("--run_dir", "mine")
    assert list(Path("mine").iterdir()) == []
    fit("--run_dir", "other")
    assert state("other") == "finished"
    assert not Path("runs").exists()


def test_metrics_csv_is_written_beside_the_users_logger_and_checkpoints_go_to_the_run_folder() -> None:
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -1}}
    callback["init_args"] |= {"every_n_train_steps": 2, "filename": "at-{step}"}  # type: ignore[operator]
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "board"}}
    cli = fit("--trainer.callbacks", json.dumps([callback]), "--trainer.logger", json.dumps(logger))
    assert [type(found).__name__ for found in cli.trainer.loggers] == ["MetricsCSV", "TensorBoardLogger"]
    with Path("runs/tiny/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])
    names = {p.name for p in Path("runs/tiny/checkpoints").iterdir()}
    assert names == {"last.ckpt", "at-step=2.ckpt", "at-step=4.ckpt"}
    assert list(Path("board").rglob("events.*"))


def test_tensorboard_in_the_run_folder_is_one_word() -> None:
    fit("--trainer.logger", "true")
    assert list(Path("runs/tiny/tensorboard").glob("events.*"))


def test_a_csv_logger_may_not_delete_metrics() -> None:
    logger: dict[str, Any] = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    logger["init_args"] = {"save_dir": "old", "name": None, "version": ""}
    Path("old").mkdir()
    Path("old/metrics.csv").write_text("step,a\n1,2\n")
    with pytest.raises(ConfigError) as caught:
        fit("--trainer.logger", json.dumps(logger))
    assert str(caught.value) == (
        "trainer.logger: Lightning's CSVLogger deletes the metrics.csv that is there when it starts\n"
        "    got:      old/metrics.csv\n"
        "    expected: a folder without one\n"
        "    try:      leave CSVLogger out: every run writes runs/tiny/metrics.csv"
    )
    assert Path("old/metrics.csv").read_text() == "step,a\n1,2\n"
    assert list(Path("runs").iterdir()) == []
    logger["init_args"]["save_dir"] = "new"
    with pytest.warns(UserWarning, match="a second time"):
        fit("--trainer.logger", json.dumps(logger))
    assert Path("new/metrics.csv").is_file()


def test_another_rank_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    cli = fit("--run_dir", "shared", "--trainer.fast_dev_run", "true")
    assert cli.model.run_folder == RunFolder(Path("shared"))
    assert not Path("shared/status.json").exists()
    assert not Path("shared/config.yaml").exists()


TWO_RANKS = """
import sys
from tests.cli.stand_ins import CLI
if __name__ == "__main__":
    cli = CLI(sys.argv[1:])
    print(f"rank {cli.trainer.global_rank}: {cli.model.run_folder.path.absolute()}", flush=True)
"""


@pytest.mark.slow
def test_two_ranks_of_lightning_share_one_folder() -> None:
    Path("two.py").write_text(TWO_RANKS)
    root = Path(distillkit.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DISTILLKIT_PLUGINS": ""}
    argv = ["fit", "--config", "tiny.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(
        [sys.executable, "two.py", *argv], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    folder = Path("runs/tiny").absolute()
    assert lines == [f"rank 0: {folder}", f"rank 1: {folder}"]
    assert [p.name for p in Path("runs").iterdir()] == ["tiny"]
    assert state("runs/tiny") == "finished"
