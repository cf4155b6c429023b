"""Runs with several teachers through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from distillkit.cli.main import main

pytestmark = pytest.mark.slow

FIT = [
    "fit", "--config", "quickstart", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
    "--model.sampler.max_new_tokens", "12", "--data.val", "[]", "--trainer.accelerator", "cpu",
    "--trainer.max_steps", "2", "--run_dir", "run",
]  # fmt: skip
LOCAL = {"name": "local", "path": "embedded:teacher"}
OTHER = {"name": "local", "path": "embedded:student"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def rows(kinds: list[str]) -> None:
    lines = [{"prompt": f"{i}+{i}>", "answer": str(2 * i % 10), "kind": kind} for i, kind in enumerate(kinds)]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def fit(teacher: dict[str, object], *more: str) -> int:
    return main([*FIT, "--model.teacher", json.dumps({"name": "mixture", **teacher}), *more])


@pytest.mark.parametrize("divergence", ["k2", "reverse_kl", "topk"])
@pytest.mark.parametrize("how", [{"route": "kind"}, {"weights": {"a": 0.9, "b": 0.1}}], ids=str)
def test_a_run_with_two_teachers_trains(how: dict[str, object], divergence: str) -> None:
    rows(["a", "b"] * 4)
    more = ["--data.train", '{"path": "rows.jsonl"}', "--model.divergence", divergence]
    assert fit({"teachers": {"a": LOCAL, "b": OTHER}, **how}, *more) == 0
    with open("run/metrics.csv") as stream:
        found = [float(row["train/divergence"]) for row in csv.DictReader(stream)]
    assert len(found) == 2 and all(value > 0 for value in found)
    assert json.loads(Path("run/environment.json").read_text())["models"]["teacher"].startswith("mixture:")


def test_a_row_without_a_teacher_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    rows(["a", "b", "c", "a"])
    arguments = ["--data.train", '{"path": "rows.jsonl"}']
    assert fit({"teachers": {"a": LOCAL, "b": OTHER}, "route": "kind"}, *arguments) == 2
    said = capsys.readouterr().err
    assert "model.teacher: rows that it cannot score (1 of 4)\n    got:      rows.jsonl, line 3: kind: 'c'" in said


def test_a_divergence_that_an_average_of_servers_cannot_give_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    server = {"name": "vllm", "urls": ["http://127.0.0.1:9"], "path": "embedded:teacher"}
    assert fit({"teachers": {"a": server, "b": LOCAL}}, "--model.divergence", "topk") == 2
    assert "TopK needs what the teacher MixtureTeacher does not give" in capsys.readouterr().err
