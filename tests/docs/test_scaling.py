"""What docs/scaling.md and the README show of `plan` and `doctor` is what they print."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import strategies

from distillkit.cli.main import main

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(
    r"```bash\n(distillkit plan .*?)\n```\n\n```text\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=range(len(SHOWN)))
def test_a_plan_of_the_page_is_what_is_printed(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert capsys.readouterr().out == output


def test_the_page_has_both_students_on_8_and_64_gpus() -> None:
    found = {run for command, _ in SHOWN for run in re.findall(r"rlad/math_(1_5b|8b)_\w+ --gpus (\d+)", command)}
    assert found == {("1_5b", "8"), ("1_5b", "64"), ("8b", "8"), ("8b", "64")}
    assert all("fits in 76.0 of 80.0 GiB" in output for _, output in SHOWN)


def test_the_readmes_doctor_says_what_the_doctor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    shown = next(
        b for b in re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "warn" in b
    )
    assert main(["doctor", "--config", "quickstart"]) == 0
    # Free memory and rounding differ from machine to machine.
    numbers = re.compile(r"\d[\d.]*(e-\d+)?")
    assert numbers.sub("#", capsys.readouterr().out) == numbers.sub("#", shown)


@pytest.mark.parametrize("what", strategies.CASES)
def test_the_pages_measurements_are_those_on_record(what: str) -> None:
    lines = (ROOT / "benchmarks" / "results" / "strategies.jsonl").read_text().splitlines()
    results = [result for line in lines if (result := json.loads(line))["what"] == what]
    assert {result["case"] for result in results} == {case.name for case in strategies.CASES[what]}
    assert strategies.table(results) in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.slow
def test_the_strategies_measurement_measures(tmp_path: Path) -> None:
    strategies.write_models(tmp_path)
    found = strategies.measure(strategies.CASES["strategies"][0], tmp_path, tmp_path / "run")
    assert all(len(found["seconds"][phase]) == strategies.STEPS for phase in strategies.PHASES)
    weights = 2 * (tmp_path / "student" / "model.safetensors").stat().st_size
    assert weights / 2**30 < found["peak_gib"] < 4
    assert strategies.table([found]).count("\n") == 2
