"""What is grouped, what differs, and the numbers of a comparison, from run folders written by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from distillkit.cli.main import main
from distillkit.errors import ConfigError, DataError
from distillkit.evaluation import Interval, paired_bootstrap
from distillkit.reporting.compare import Group, Spread, compare_runs
from distillkit.reporting.compare_plot import comparison_figure, group_curve, write_comparison_plot
from distillkit.reporting.compare_report import aligned, markdown, sections
from distillkit.reporting.compared_runs import flatten
from distillkit.reporting.metrics import MetricsCSV
from tests.reporting.made_runs import config, make_run

Y, N = [True], [False]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def two_groups() -> list[str]:
    """Four problems; two seeds with β 0.2, two with β 0."""
    make_run("a1", {0: [N, N, N, N], 5: [Y, Y, N, N], 10: [Y, N, N, N]}, settings=config(1), name="kdrl")
    make_run("a2", {0: [N, N, N, N], 5: [Y, N, N, N], 10: [Y, Y, N, N]}, settings=config(2), name="kdrl")
    make_run("b1", {0: [N, N, N, N], 5: [N, N, N, N], 10: [Y, Y, Y, N]}, settings=config(1, 0.0), name="grpo")
    make_run("b2", {0: [N, N, N, N], 5: [N, N, N, N], 10: [Y, Y, Y, N]}, settings=config(2, 0.0), name="grpo")
    return ["a1", "b1", "a2", "b2"]


def test_runs_that_differ_in_nothing_but_the_seed_are_one_group() -> None:
    found = compare_runs(two_groups())
    assert [(g.label, [str(r.folder) for r in g.runs], [r.seed for r in g.runs]) for g in found.groups] == [
        ("kdrl", ["a1", "a2"], [1, 2]),
        ("grpo", ["b1", "b2"], [1, 2]),
    ]
    assert found.differences == {"model.beta.value": (0.2, 0.0)}


def test_the_results_are_those_worked_out_by_hand() -> None:
    found = compare_runs(two_groups())
    first, second = found.groups
    assert first.final("pass@1") == Spread(mean=0.375, deviation=pytest.approx(math.sqrt(2) / 8), count=2)
    assert first.best("pass@1") == Spread(mean=0.5, deviation=0.0, count=2)
    assert second.final("pass@1") == Spread(mean=0.75, deviation=0.0, count=2)
    assert first.final("length") == Spread(mean=13.0, deviation=0.0, count=2)
    assert first.best("length") == Spread(mean=3.0, deviation=0.0, count=2), "shorter is better"
    assert first.results() == {0: 1.0, 1: 0.5, 2: 0.0, 3: 0.0}
    (interval,) = found.intervals
    assert interval == paired_bootstrap([1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], resamples=10_000, seed=0)
    assert interval.estimate == 0.375


def test_several_completions_are_averaged_and_unscored_ones_left_out() -> None:
    make_run("a", {0: [[True, False], [True, None], [None, None]]}, settings=config(1))
    make_run("b", {0: [[True, True], [None, None], [True, True]]}, settings=config(1, 0.0))
    found = compare_runs(["a", "b"])
    first, second = (group.results() for group in found.groups)
    assert (first[0], first[1], math.isnan(first[2])) == (0.5, 1.0, True)
    assert (second[0], math.isnan(second[1]), second[2]) == (1.0, True, 1.0)
    assert found.intervals == (Interval(estimate=0.5, low=0.5, high=0.5, level=0.95, problems=1),)


def test_no_problem_known_to_both_is_no_interval() -> None:
    make_run("a", {0: [[True], [None]]}, settings=config(1))
    make_run("b", {0: [[None], [True]]}, settings=config(1, 0.0))
    found = compare_runs(["a", "b"])
    assert found.intervals == (None,)
    assert "no problem is known to both" in "\n".join(aligned(sections(found)[3]))


def test_each_run_counts_at_its_own_last_evaluation() -> None:
    make_run("short", {0: [N, N], 4: [Y, N]}, settings=config(1), state="stopped")
    make_run("long", {0: [N, N], 4: [N, N], 8: [Y, Y]}, settings=config(2))
    (group,) = compare_runs(["short", "long"]).groups
    assert [run.step for run in group.runs] == [4, 8]
    assert group.final("pass@1") == Spread.of([0.5, 1.0])
    assert list(group_curve(group, "pass@1").items()) == [(0, Spread.of([0.0, 0.0])), (4, Spread.of([0.5, 0.0]))]


def test_an_evaluation_whose_answers_were_not_written_is_not_the_last() -> None:
    make_run("killed", {0: [N, N], 4: [Y, N]})
    lines = Path("killed/eval/held_out.jsonl").read_text().splitlines(keepends=True)
    Path("killed/eval/held_out.jsonl").write_text("".join(lines[:2]))
    assert compare_runs(["killed"]).groups[0].runs[0].step == 0


def test_parts_are_named_and_their_arguments_stand_beneath() -> None:
    make_run("a", {0: [Y]}, settings=config(teacher=None))
    local = {"class_path": "distillkit.teachers.local.LocalTeacher", "init_args": {"path": "t"}}
    make_run("b", {0: [Y]}, settings=config(teacher={"class_path": "mine.Own", "init_args": {"teacher": local}}))
    assert compare_runs(["a", "b"]).differences == {
        "model.teacher": (None, "mine.Own"),
        "model.teacher.teacher": ("-", "local"),
        "model.teacher.teacher.path": ("-", "t"),
    }
    assert dict(flatten({"a": [], "b": [{"c": 1}, 2], "d": {}})) == {"a": [], "b[0].c": 1, "b[1]": 2}


def test_what_is_ignored_is_no_difference() -> None:
    for seed in (1, 2):
        settings = config(seed)
        settings["model"]["student"] = f"runs/sft-{seed}/student"
        settings["run_dir"] = f"r{seed}"
        make_run(f"r{seed}", {0: [Y]}, settings=settings)
    assert len(compare_runs(["r1", "r2"]).groups) == 2
    assert len(compare_runs(["r1", "r2"], ignore=["model.student"]).groups) == 1
    assert len(compare_runs(["r1", "r2"], ignore=["model"]).groups) == 1
    assert len(compare_runs(["r1", "r2"], ignore=["model.stud"]).groups) == 2


def test_labels_fall_back_to_folders_until_they_tell_groups_apart() -> None:
    for folder, beta in (("x/run", 0.1), ("y/run", 0.2), ("x/more", 0.3)):
        make_run(folder, {0: [Y]}, settings=config(1, beta))

    def labels(*folders: str) -> list[str]:
        return [group.label for group in compare_runs(folders).groups]

    assert labels("x/run") == ["made"]
    assert labels("x/run", "x/more") == ["run", "more"]
    assert labels("x/run", "y/run") == ["x/run", "y/run"]


def test_sets_are_chosen_by_name_and_others_are_named() -> None:
    make_run("a", {0: [Y]}, sets=("validation", "held_out", "more"))
    make_run("b", {0: [Y]}, sets=("validation", "held_out"), settings=config(2))
    found = compare_runs(["a", "b"])
    assert (found.set_name, found.other_sets) == ("held_out", ("validation",))
    assert compare_runs(["a", "b"], set_name="validation").set_name == "validation"


def val(*names: str) -> dict[str, Any]:
    return {"val": [{"name": name, "source": {"path": "p"}} for name in names]}


def test_the_first_set_is_the_first_of_the_config_not_of_the_alphabet() -> None:
    sets = ("held_out", "more", "validation")
    make_run("a", {0: [Y]}, sets=sets, settings={**config(1), "data": val("validation", "held_out")})
    make_run("b", {0: [Y]}, sets=sets, settings={**config(2), "data": val("held_out", "validation")})
    own = {"class_path": "mine.Data", "init_args": val("more", "validation")}
    make_run("c", {0: [Y]}, sets=("held_out", "validation"), settings={**config(3), "data": own})
    assert compare_runs(["a", "b"]).set_name == "validation"
    assert compare_runs(["a", "b"]).other_sets == ("held_out", "more")
    assert compare_runs(["b", "a"]).set_name == "held_out"
    assert compare_runs(["c", "a"]).set_name == "validation"
    assert compare_runs(["a", "b"], set_name="more").other_sets == ("validation", "held_out")


@pytest.mark.parametrize("data", [None, 7, {}, {"val": 7}, {"val": None}, {"val": ["x"]}, {"init_args": 7}])
def test_a_config_without_named_sets_leaves_the_order_of_the_names(data: Any) -> None:
    make_run("a", {0: [Y]}, sets=("validation", "held_out"), settings={**config(1), "data": data})
    assert compare_runs(["a"]).set_name == "held_out"


# ---- what it looks like


def test_the_tables_of_the_screen() -> None:
    runs, configs, results, against = (aligned(section) for section in sections(compare_runs(two_groups())))
    assert runs == [
        "  run  group  seed  state     last evaluation",
        "  a1   kdrl   1     finished  10",
        "  a2   kdrl   2     finished  10",
        "  b1   grpo   1     finished  10",
        "  b2   grpo   2     finished  10",
    ]
    assert configs == [
        "  setting           kdrl  grpo",
        "  model.beta.value  0.2   0.0",
        "  -: the config has no such setting.",
    ]
    assert results[:3] == [
        "  group  runs  step  pass@1         best pass@1    length",
        "  kdrl   2     10    0.375 ± 0.177  0.500 ± 0.000  13.0 ± 0.0",
        "  grpo   2     10    0.750 ± 0.000  0.750 ± 0.000  13.0 ± 0.0",
    ]
    assert against[:2] == [
        "  group  difference  95 % interval  problems  without 0",
        "  grpo   +0.375      +0 to +0.75    4         no",  # 5 of the 256 resamples are above 0.75: below 2.5 %
    ]


def test_unfinished_runs_and_one_run_alone_say_so() -> None:
    make_run("a", {0: [Y, N]}, state="running")
    runs, configs, results, against = (aligned(section) for section in sections(compare_runs(["a"])))
    assert runs[-1] == "  Not finished: a; the last evaluation so far is taken."
    assert configs == ["  One run: nothing to compare it with."]
    assert results[1] == "  made   1     0     0.500   0.500        3.000"
    assert against == ["  No other group."]
    make_run("b", {0: [Y, N]}, settings=config(2))
    assert aligned(sections(compare_runs(["a", "b"]))[1]) == ["  Nothing but the seed."]


def test_evaluations_that_are_not_of_the_last_step_say_so() -> None:
    make_run("a", {0: [N, N], 5: [Y, N]}, settings=config(1), name="kdrl")
    make_run("b", {0: [N, N], 5: [Y, N], 8: [Y, Y]}, settings=config(2), name="kdrl")
    make_run("c", {0: [N, N], 8: [Y, N]}, settings=config(1, 0.0), name="grpo")
    MetricsCSV(folder="a").log_metrics({"train/reward": 0.5}, step=7)
    found = compare_runs(["a", "b", "c"])
    assert [run.last_step for run in found.runs] == [7, 8, 8]
    runs, _, results, _ = (aligned(section) for section in sections(found))
    assert runs[-1] == ("  Trained on after the last evaluation: a (step 5 of 7); the results are not the final ones.")
    assert "  Evaluated at different steps: kdrl 5 to 8, grpo 8." in results
    runs, _, results, _ = (aligned(section) for section in sections(compare_runs(["b", "c"])))
    assert not any("Trained on" in line for line in runs)
    assert not any("different steps" in line for line in results)


def test_the_page_holds_every_table_and_the_plot() -> None:
    make_run("a", {0: [Y]}, settings=config(1), name="a|b")
    make_run("b", {0: [N]}, settings=config(1, 0.0), name="c")
    page = markdown(compare_runs(["a", "b"]), "compare.png")
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# a|b · c",
        "## Runs",
        "## What differs in the configs",
        "## Results on held_out",
        "## pass@1 against a|b",
    ]
    assert "| setting | a\\|b | c |\n| --- | --- | --- |\n| model.beta.value | 0.2 | 0.0 |" in page
    assert "| c | -1 | -1 to -1 | 1 | yes |" in page
    assert page.endswith("![pass@1 on held_out by step](compare.png)\n")


def test_the_plot_is_each_groups_mean_with_a_band_over_its_seeds(tmp_path: Path) -> None:
    folders = two_groups()
    make_run("c", {0: [N, N, N, N], 10: [Y, Y, Y, Y]}, settings=config(1, 0.5), name="alone")
    found = compare_runs([*folders, "c"])
    (axes,) = comparison_figure(found).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert drawn == {
        "kdrl (2 runs)": ([0, 5, 10], [0.0, 0.375, 0.375]),
        "grpo (2 runs)": ([0, 5, 10], [0.0, 0.0, 0.75]),
        "alone (1 run)": ([0, 10], [0.0, 1.0]),
    }
    bands = [np.unique(band.get_paths()[0].vertices[:, 1].round(6)) for band in axes.collections]
    half = math.sqrt(2) / 8
    assert len(bands) == 2
    assert {round(v, 6) for v in bands[0]} == {0.0, round(0.375 - half, 6), round(0.375 + half, 6)}
    write_comparison_plot(found, tmp_path / "deep" / "compare.png")
    assert image.imread(tmp_path / "deep" / "compare.png").shape[1] == 960


# ---- what cannot be compared


def refused(*folders: str, **options: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        compare_runs(folders, **options)
    return str(caught.value)


def test_folders_that_are_no_runs() -> None:
    make_run("quick", {0: [Y]})
    Path("empty").mkdir()
    expected = "    expected: what distillkit fit leaves, such as runs/quickstart"
    assert refused("quik") == f"quik: not a run folder\n    got:      no such folder\n{expected}\n    try:      quick"
    got = "    got:      no config.yaml or status.json in it"
    assert refused("quick", "empty") == f"empty: not a run folder\n{got}\n{expected}"
    assert refused() == "compare: no runs\n    expected: run folders"
    assert refused("quick", "./quick") == "quick: given twice\n    expected: each run once"


def test_a_run_without_an_evaluation() -> None:
    make_run("young", {}, state="running")
    assert refused("young") == (
        "young: no evaluation in it\n"
        "    got:      a fit run that is running\n"
        "    expected: eval/<set>.jsonl\n"
        "    try:      wait for its first validation, or run it with data.val"
    )


def test_runs_on_different_evaluation_sets() -> None:
    make_run("a", {0: [Y]}, sets=("easy",))
    make_run("b", {0: [Y]}, sets=("hard", "harder"))
    assert refused("a", "b") == (
        "the runs share no evaluation set\n"
        "    got:      a: easy; b: hard, harder\n"
        "    expected: a set that all of them have"
    )
    assert refused("b", set_name="herder") == (
        "b: no results on the evaluation set 'herder'\n"
        "    got:      hard, harder\n"
        "    expected: herder\n"
        "    try:      --set harder"
    )


def test_runs_on_different_problems() -> None:
    make_run("a", {0: [Y, Y, Y]})
    make_run("b", {0: [Y, Y]}, settings=config(2))
    make_run("c", {0: [Y, Y, Y]}, settings=config(3), gold="8")
    hint = "    try:      --set of a set that all runs share, or distillkit validate with the same data.val"
    assert refused("a", "b") == (
        "b: evaluated on other problems than a (set 'held_out')\n"
        "    got:      2 problems, 1 missing\n"
        f"    expected: the same 3 problems\n{hint}"
    )
    assert refused("a", "c") == (
        "c: evaluated on other problems than a (set 'held_out')\n"
        "    got:      3 problems, 3 with another prompt or gold answer, the first with index 0\n"
        f"    expected: the same 3 problems\n{hint}"
    )


def test_metrics_that_are_not_there() -> None:
    make_run("a", {0: [Y]})
    assert refused("a", metric="accuracy") == (
        "--metric: no such metric\n"
        "    got:      accuracy\n"
        "    expected: pass@<k>, mean@<k>, maj@<k>, format, truncated, length, unscored"
    )
    assert refused("a", metric="pass@8") == (
        "a: no pass@8 on the evaluation set 'held_out'\n"
        "    got:      pass@1, length\n"
        "    expected: pass@8\n"
        "    try:      --metric pass@1"
    )


@pytest.mark.parametrize(
    ("file", "text", "start"),
    [
        ("config.yaml", "model: [", "a/config.yaml: cannot be read\n    got:      while parsing"),
        (
            "eval/held_out.jsonl",
            '{"schema_version": 1, "step": 0,',
            "a/eval/held_out.jsonl: not a file of evaluation results\n    got:      JSONDecodeError: ",
        ),
        (
            "eval/held_out.jsonl",
            '{"schema_version": 2, "step": 0}',
            "a/eval/held_out.jsonl: evaluation results\n    got:      schema_version 2\n    expected: 1",
        ),
        (
            "eval/held_out.jsonl",
            '{"schema_version": 1, "step": 0, "set": "x"}',
            "a/eval/held_out.jsonl: not a file of evaluation results\n    got:      KeyError: 'completions'",
        ),
        ("metrics.csv", "step,a\n1,x,3\n", "a/metrics.csv:2: not a row"),
        ("status.json", "[]", "a/status.json: not a status file"),
    ],
)
def test_damaged_files_are_named(file: str, text: str, start: str) -> None:
    make_run("a", {0: [Y]})
    Path("a", file).write_text(text)
    assert refused("a").startswith(start)


def test_groups_without_a_metric_show_it_as_missing() -> None:
    make_run("a", {0: [Y]})
    (group,) = compare_runs(["a"]).groups
    assert (group.final("maj@8"), group.best("maj@8")) == (None, None)
    assert isinstance(group, Group)


# ---- two real runs


@pytest.mark.slow
def test_two_real_runs(capsys: pytest.CaptureFixture[str]) -> None:
    fit = [
        "fit", "--config", "quickstart", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
        "--data.val.0.source.limit", "40", "--data.prompts_per_step", "4", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    assert main([*fit, "--run_dir", "runs/with"]) == 0
    assert main([*fit, "--run_dir", "runs/without", "--model.teacher", "null", "--model.divergence", "null"]) == 0
    assert main([*fit, "--run_dir", "runs/again", "--seed_everything", "2"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs/with", "runs/without", "runs/again", "--output", "out"]) == 0
    said = capsys.readouterr().out
    found = compare_runs(["runs/with", "runs/without", "runs/again"])
    assert [[r.folder.name for r in g.runs] for g in found.groups] == [["with", "again"], ["without"]]
    assert found.differences["model.divergence"] == ("k2", None)
    assert {path.split(".")[1] for path in found.differences} == {"teacher", "divergence"}
    (first, second), (interval,) = found.groups, found.intervals
    assert interval is not None and interval.problems == 40
    for group in found.groups:
        for run in group.runs:
            with (run.folder / "metrics.csv").open() as stream:
                last = [row for row in csv.DictReader(stream) if row["step"] == "2"]
            assert float(last[0]["val/held_out/pass@1"]) == pytest.approx(np.mean(list(run.results.values())))
    final = [group.final("pass@1") for group in (first, second)]
    assert final[0] is not None and final[1] is not None
    assert interval.estimate == pytest.approx(final[1].mean - final[0].mean)
    assert f"{interval.estimate:+.4g}" in said and said.endswith("Written: out/compare.md, out/compare.png\n")
    assert Path("out/compare.md").read_text().startswith("# ")
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG")
