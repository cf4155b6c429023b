"""docs/run_folder.md: its examples are what the code reads, its tables name what the code writes."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from distillkit.cli.environment import describe
from distillkit.evaluation.results import CompletionResult, read_results
from distillkit.reporting.metrics import read_metrics
from distillkit.reporting.plots import write_plots
from distillkit.reporting.rollouts import PER_TOKEN, read_rollouts, write_rollouts
from distillkit.reporting.run_folder import RunStatus
from distillkit.reporting.viewer import main
from tests.reporting.conftest import Step

PAGE = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text(encoding="utf-8")
BLOCKS = {m[1].strip(): m[2] for m in re.finditer(r"^```(.+?)\n(.*?)^```$", PAGE, flags=re.M | re.S)}


def example(name: str, folder: Path) -> Path:
    """The page's example as the file it stands for: JSON on one line."""
    (kind,) = [block for block in BLOCKS if block.endswith(f" {name}")]
    text = BLOCKS[kind]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if kind.startswith("csv") else json.dumps(json.loads(text)) + "\n")
    return path


def table_keys(heading: str) -> list[str]:
    """The names in the first column of the table that starts with `heading`."""
    start = PAGE.index(f"| {heading} | type | meaning |")
    rows = PAGE[start:].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_block_is_checked_here() -> None:
    assert set(BLOCKS) == {
        "csv metrics.csv",
        "json rollouts/step-000012.jsonl",
        "console",
        "json eval/held_out.jsonl",
        "json status.json",
    }


def test_the_metrics_example(tmp_path: Path) -> None:
    rows = read_metrics(example("metrics.csv", tmp_path))
    assert [row.step for row in rows] == [0, 1, 2]
    assert rows[0].values == {"val/held_out/pass@1": 0.43} and rows[2].values["train/reward"] == 0.5625
    documented = re.findall(r"`([^`]+)`", PAGE[PAGE.index("| metric |") : PAGE.index("When a run is resumed")])
    patterns = [re.sub(r"<.+?>", ".+", name) for name in documented]
    for name in rows[2].values:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    assert len(write_plots(tmp_path / "metrics.csv", tmp_path / "plots")) == 5


def test_the_rollout_example_and_its_tables(tmp_path: Path, step: Step) -> None:
    path = example("rollouts/step-000012.jsonl", tmp_path)
    (rollout,) = read_rollouts(path)
    assert "".join(rollout.token_texts) == rollout.text + "<eos>"
    assert rollout.token_ids == tuple(step.tokenizer(rollout.text + "<eos>")["input_ids"])
    ratios = rollout.log_ratios
    assert [d**2 / 2 for d in ratios if d is not None] == pytest.approx(rollout.per_token["divergence"], abs=1e-9)
    record = json.loads(path.read_text())
    written = write_rollouts(tmp_path, step.output, step.tokenizer, 1).read_text().splitlines()
    assert list(record) == table_keys("key") == list(json.loads(written[0]))
    assert set(table_keys("key of `tokens`")) == {"text", "id", "sampled", *PER_TOKEN}
    assert set(record["tokens"]) == set(table_keys("key of `tokens`")) - {"reference_logprobs", "distil_logprobs"}


def test_the_console_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example("rollouts/step-000012.jsonl", tmp_path / "runs/quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    command, output = BLOCKS["console"].split("\n", 1)
    program, subcommand, *arguments = shlex.split(command.removeprefix("$ "))
    assert (program, subcommand) == ("distillkit", "rollouts")
    assert main(arguments) == 0
    assert capsys.readouterr().out == output


def test_the_evaluation_example_and_its_tables(tmp_path: Path) -> None:
    path = example("eval/held_out.jsonl", tmp_path)
    ((step, result),) = read_results(path)
    assert (step, result.set_name, result.index) == (50, "held_out", 17)
    assert result.completions[0].correct is True
    start = PAGE.index("## eval/")
    section = PAGE[start:]
    keys = re.findall(r"^\| `(\w+)` \|", section[: section.index("| key of a completion")], flags=re.M)
    assert keys == list(json.loads(path.read_text()))
    assert set(table_keys("key of a completion")) == {field.name for field in fields(CompletionResult)}


def test_the_status_example_and_the_keys_of_the_environment(tmp_path: Path) -> None:
    status = RunStatus(**json.loads(BLOCKS["json status.json"]))
    assert status.state == "finished"
    last = PAGE[PAGE.index("`environment.json` has") :]
    assert set(describe([], {})) == set(re.findall(r"`(\w+)`", last))
