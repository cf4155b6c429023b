"""`distillkit compare` on the command line: what is printed, written and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillkit.cli.main import main
from tests.reporting.made_runs import config, make_run

RIGHT, WRONG = [True], [False]


@pytest.fixture
def runs() -> list[str]:
    make_run("a", {0: [WRONG, WRONG], 3: [RIGHT, WRONG]}, settings=config(1), name="kdrl")
    make_run("b", {0: [WRONG, WRONG], 3: [RIGHT, RIGHT]}, settings=config(1, 0.0), name="grpo")
    return ["a", "b"]


def test_everything_is_printed_and_written(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs]) == 0
    assert (
        capsys.readouterr().out
        == """\
Runs
  run  group  seed  state     last evaluation
  a    kdrl   1     finished  3
  b    grpo   1     finished  3

What differs in the configs
  setting           kdrl  grpo
  model.beta.value  0.2   0.0
  -: the config has no such setting.

Results on held_out
  group  runs  step  pass@1  best pass@1  length
  kdrl   1     3     0.500   0.500        6.000
  grpo   1     3     1.000   1.000        6.000
  Mean ± sample standard deviation over the runs of a group, each at its own last evaluation.
  Best pass@1: at each run's best evaluation, chosen on these very problems and so too good to be true.

pass@1 against kdrl
  group  difference  95 % interval  problems  without 0
  grpo   +0.5        +0 to +1       2         no
  Group minus kdrl: paired bootstrap over problems, each with the mean of its group's seeds and completions.
  The interval is for the choice of problems; how much another seed changes is the standard deviation above.

Written: compare/compare.md, compare/compare.png
"""
    )
    assert sorted(path.name for path in Path("compare").iterdir()) == ["compare.md", "compare.png"]


def test_the_options(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "held_out", "--metric", "length", "--ignore", "model.beta", "--output", "deep/out"]
    assert main(["compare", *runs, *more]) == 0
    said = capsys.readouterr().out
    assert "Nothing but the seed." in said
    assert "Written: deep/out/compare.md, deep/out/compare.png" in said
    assert main(["compare", *runs, *more]) == 0, "an earlier comparison is replaced"


def test_what_cannot_be_compared_writes_nothing(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "c"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: c: not a run folder\n"
        "    got:      no such folder\n"
        "    expected: what distillkit fit leaves, such as runs/quickstart\n"
    )
    assert not Path("compare").exists()
    with pytest.raises(SystemExit) as ended:
        main(["compare"])
    assert ended.value.code == 2
