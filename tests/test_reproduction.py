"""The small matrix: what it runs exists, its rule of judgement is right, and its page follows from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reproduce
import yaml
from reproduction.claims import CLAIMS, Claim, judge
from reproduction.methods import METHODS, SEEDS
from reproduction.report import write_report

from distillkit.cli.shipped import find_config

ROOT = Path(__file__).parents[1]


def value_at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_four_trials_over_settings_that_its_recipe_has(name: str) -> None:
    method = METHODS[name]
    recipe = yaml.safe_load(find_config(method.stages[-1].recipe).read_text())
    assert len(method.trials) == 4
    assert len({tuple(sorted(trial.items())) for trial in method.trials}) == 4
    assert sum(stage.share for stage in method.stages) == 1
    for trial in method.trials:
        for path in trial:
            value_at(recipe, path)


def run(correct: str, **figures: float) -> dict[str, Any]:
    return {"correct": correct, **figures}


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ("1" * 90 + "0" * 10, "1" * 60 + "0" * 40, "held"),
        ("1" * 60 + "0" * 40, "1" * 90 + "0" * 10, "not held"),
        ("1" * 60 + "0" * 40, "0" * 40 + "1" * 60, "cannot be told at this scale"),
    ],
)
def test_a_claim_about_problems_needs_the_interval_and_every_seed(first: str, second: str, word: str) -> None:
    claim = Claim(source="", text="", first="a", second="b")
    found = judge(claim, {"a": [run(first)] * 3, "b": [run(second)] * 3})
    assert found.word == word
    assert found.difference == pytest.approx((first.count("1") - second.count("1")) / 100)


def test_one_seed_on_the_other_side_leaves_a_claim_open() -> None:
    claim = Claim(source="", text="", first="a", second="b")
    good, bad = run("1" * 90 + "0" * 10), run("1" * 50 + "0" * 50)
    assert judge(claim, {"a": [good, good, bad], "b": [bad, bad, good]}).word == "cannot be told at this scale"


def test_a_claim_about_length_needs_every_run_beyond_every_other() -> None:
    claim = Claim(source="", text="", first="a", second="b", measure="length", direction=-1)
    short, long = [run("1", length=9.0), run("1", length=9.5)], [run("1", length=10.0), run("1", length=11.0)]
    assert judge(claim, {"a": short, "b": long}).word == "held"
    assert judge(claim, {"a": long, "b": short}).word == "not held"
    assert judge(claim, {"a": [short[0], long[1]], "b": [short[1], long[0]]}).word == "cannot be told at this scale"


def test_every_claim_compares_two_methods_of_the_matrix() -> None:
    assert {name for claim in CLAIMS for name in (claim.first, claim.second)} <= set(METHODS)


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.jsonl")
    jobs = list(reproduce.tuning_jobs(["grpo"]))
    done = {"phase": "tune", "method": "grpo", "seed": jobs[0].seed, "trial": dict(jobs[0].trial), "validation": 0.5}
    reproduce.RESULTS.write_text(json.dumps(done) + "\n")
    assert reproduce.pending(jobs) == jobs[1:]
    with pytest.raises(SystemExit, match="grpo: 3 trials are missing"):
        reproduce.chosen("grpo")


def test_the_chosen_trial_is_the_best_on_validation_and_ties_go_to_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.jsonl")
    scores = [(0.5, 0.4), (0.7, 0.3), (0.7, 0.6), (0.6, 0.9)]
    lines = [
        {"phase": "tune", "method": "grpo", "seed": 0, "trial": dict(trial), "validation": validation, "area": area}
        for trial, (validation, area) in zip(METHODS["grpo"].trials, scores, strict=True)
    ]
    reproduce.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reproduce.chosen("grpo") == METHODS["grpo"].trials[2]


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    rows = reproduce.results()
    assert {(r["method"], r["seed"]) for r in rows if r["phase"] == "run"} == {(m, s) for m in METHODS for s in SEEDS}
    write_report(rows, tmp_path, reproduce.BUDGET)
    assert (tmp_path / "reproduction.md").read_text() == (ROOT / "docs" / "reproduction.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_the_recipes_carry_the_chosen_settings(name: str) -> None:
    recipe = yaml.safe_load(find_config(METHODS[name].stages[-1].recipe).read_text())
    chosen = reproduce.chosen(name)
    assert {path: float(value_at(recipe, path)) for path in chosen} == pytest.approx(dict(chosen))


@pytest.mark.slow
def test_a_run_of_the_matrix_leaves_a_complete_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "BUDGET", 6_000)
    job = reproduce.Job(phase="run", method="sft_then_rl", seed=1, trial=METHODS["sft_then_rl"].trials[0])
    line = json.loads(json.dumps(reproduce.execute(job, tmp_path, threads=1)))
    assert 6_000 <= line["tokens"] < 12_000
    assert line["steps"] == line["curve"][-1][0]
    assert [point[1] for point in line["curve"]] == sorted(point[1] for point in line["curve"])
    assert len(line["correct"]) == len(line["aligned"]) == 500
    assert line["accuracy"] == pytest.approx(line["curve"][-1][3])
    assert 0 < line["teacher_reverse_kl"] < 10
    assert 0 < line["paths"] <= 8
