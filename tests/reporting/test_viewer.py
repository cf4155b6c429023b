"""`distillkit rollouts`: the whole text of a fixed example, its colours, and what it says when there is nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from distillkit.errors import ConfigError, DataError, DistillkitError
from distillkit.reporting.rollouts import write_rollouts
from distillkit.reporting.viewer import main
from distillkit.types import RolloutBatch, StepOutput
from tests.reporting.conftest import Step

LEGEND = "d = log pi_teacher - log pi_student of a token, nats; disliked: the lowest d below -0.5\n"
FIRST = (
    "\n[1] group 10, reward 1.05 (answer 1, format 0.5), right, stop, 2 tokens, mean gap +0.075 nats/token\n"
    "    prompt    3+4>\n"
    "    gold      7\n"
    "    tokens    7<eos>\n"
)
SECOND = (
    "\n[2] group 10, reward 0 (answer 0, format not scored), wrong, format not_applicable, length, 2 tokens, "
    "mean gap -2.375 nats/token\n"
    "    prompt    3+4>\n"
    "    gold      7\n"
    "    tokens    12\n"
    '    disliked  "1" at 0 (-4.00), "2" at 1 (-0.75)\n'
)
THIRD = (
    "\n[3] group 11, reward 0.05 (answer 0, format 0.5), wrong, answer unparseable, stop, 2 tokens, "
    "mean gap -1.250 nats/token\n"
    "    prompt    2+5>\n"
    "    gold      7\n"
    "    tokens    5<eos>\n"
    '    disliked  "5" at 0 (-3.00)\n'
)
FOURTH = (
    "\n[4] group 11, reward not scored (answer not scored, format 0.5), answer crashed, stop, 2 tokens, "
    "mean gap -inf nats/token\n"
    "    prompt    2+5>\n"
    "    gold      7\n"
    "    tokens    7<eos>\n"
    '    disliked  "<eos>" at 1 (-inf)\n'
)


@pytest.fixture
def run(tmp_path: Path, step: Step, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with rollouts of steps 2 and 12."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for number in (2, 12):
        write_rollouts(tmp_path / "runs/a/rollouts", step.output, step.tokenizer, number)
    return Path("runs/a")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_the_whole_text_when_piped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"runs/a, step 12: 4 of 4 rollouts\n{LEGEND}{FIRST}{SECOND}{THIRD}{FOURTH}"
    assert shown(capsys, str(run)) == expected


def test_step_limit_and_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = f"step 2: 1 of 4 rollouts\n{LEGEND}{FIRST}"
    assert shown(capsys, str(run), "--step", "2", "--limit", "1") == f"runs/a, {start}"
    assert shown(capsys, "runs/a/rollouts", "--step", "2", "--limit", "1") == f"runs/a/rollouts, {start}"
    file = "runs/a/rollouts/step-000002.jsonl"
    assert shown(capsys, file, "--limit", "1") == f"{file}, {start}"
    assert shown(capsys, file, "--limit", "1", "--step", "2") == f"{file}, {start}"


def order(text: str) -> list[str]:
    return re.findall(r"^\[\d+\] (group \d+, reward [\d.n]+)", text, flags=re.M)


def test_sorts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = "group 10, reward 1.05", "group 10, reward 0"
    three, four = "group 11, reward 0.05", "group 11, reward n"
    assert order(shown(capsys, str(run), "--sort", "reward")) == [one, three, two, four]
    assert order(shown(capsys, str(run), "--sort", "gap")) == [four, two, three, one]


def test_rollouts_of_all_ranks_are_one_step(run: Path, step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    write_rollouts(run / "rollouts", step.output, step.tokenizer, 12, rank=1)
    assert shown(capsys, str(run)).startswith("runs/a, step 12: 8 of 8 rollouts\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def in_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    with redirect_stdout(Terminal()) as out:
        assert main(arguments) == 0
    return out.getvalue()


def test_tokens_are_coloured_by_the_teachers_log_ratio(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = in_terminal(monkeypatch, str(run))
    tokens = [line.split("tokens    ")[1] for line in text.splitlines() if "    tokens    " in line]
    strong, red = "\x1b[1;37;41m", "\x1b[31m"
    # the label is dim up to here; d = +0.05, +0.1 | -4, -0.75 | -3, +0.5 | -0.25, -inf
    assert tokens == [
        "\x1b[0m7<eos>",
        f"\x1b[0m{strong}1\x1b[0m{red}2\x1b[0m",
        f"\x1b[0m{strong}5\x1b[0m\x1b[32m<eos>\x1b[0m",
        f"\x1b[0m7{strong}<eos>\x1b[0m",
    ]
    assert f"colours: {strong} d < -2 \x1b[0m {red} -2 to -0.5 \x1b[0m  -0.5 to 0.5  \x1b[32m 0.5 to 2 \x1b[0m" in text
    assert "\x1b[1;37;42m d >= 2 \x1b[0m \x1b[2mnot computed\x1b[0m" in text
    assert "\x1b[1;32m[1] group 10" in text and "\x1b[1;31m[2] group 10" in text and "\x1b[1m[4] group 11" in text


def test_tokens_without_a_teacher_are_dim_and_there_is_no_legend(
    run: Path, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = replace(step.output, rewards=None, per_token={})
    path = write_rollouts("b/rollouts", output, step.tokenizer, 1, limit=1)
    assert in_terminal(monkeypatch, str(path)) == (
        f"{path}, step 1: 1 of 1 rollouts\n\n\x1b[1m[1] group 10, stop, 2 tokens\x1b[0m\n"
        "\x1b[2m    prompt    \x1b[0m3+4>\n"
        "\x1b[2m    gold      \x1b[0m7\n"
        "\x1b[2m    tokens    \x1b[0m\x1b[2m7\x1b[0m\x1b[2m<eos>\x1b[0m\n"
    )


@pytest.mark.parametrize("how", ["--no-color", "NO_COLOR"])
def test_no_colour_on_request(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    piped = shown(capsys, str(run))
    if how == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    text = in_terminal(monkeypatch, str(run), *([how] if how.startswith("-") else []))
    assert "\x1b" not in text
    assert re.sub(r"\s+", " ", text) == re.sub(r"\s+", " ", piped)


def test_texts_of_the_model_cannot_act_on_the_terminal(
    tmp_path: Path, make_batch: Callable[..., RolloutBatch], step: Step, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_batch(("[red]q[/red]\n>", ["[bold]1\n2"]), rows=[{"answer": {"role\x1b[2J": ["é"]}}])
    messages = [{"role": "user", "content": "a\x1b[2J"}, {"role": "assistant", "content": None}]
    output = StepOutput(rollouts=replace(batch, prompts=(messages,)), rewards=None, metrics={})
    path = write_rollouts(tmp_path, output, step.tokenizer, 1)
    assert shown(capsys, str(path)) == (
        f"{path}, step 1: 1 of 1 rollouts\n\n[1] group 10, length, 9 tokens\n"
        "    prompt    user: a\\x1b[2J\n"
        "              assistant: None\n"
        '    gold      {"role\\u001b[2J": ["é"]}\n'
        "    tokens    [bold]1\\n\n"
        "              2\n"
    )


def test_a_narrow_encoding_still_shows_the_rest(run: Path, step: Step) -> None:
    output = replace(step.output, rollouts=replace(step.output.rollouts, prompts=("é漢",) * 4))
    path = write_rollouts("b", output, step.tokenizer, 1, limit=1)
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding="ascii")) as out:
        assert main([str(path)]) == 0
        out.flush()
        assert b"    prompt    \\xe9\\u6f22\n" in raw.getvalue()


def error(*arguments: str) -> str:
    with pytest.raises(DistillkitError) as caught:
        main(arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_whole_text_of_the_errors(run: Path) -> None:
    assert error("runs/b") == "runs/b: no such run\n    expected: a run folder, or one of its rollouts/*.jsonl"
    other = error(str(run), "--step", "3")
    assert other == "runs/a: no rollouts of this step\n    got:      3\n    expected: one of 2, 12"
    nothing = (
        "{}: no rollouts in it\n    expected: rollouts/step-<step>.jsonl\n"
        "    try:      the first are written after step 1"
    )
    Path("runs/b").mkdir()
    assert error("runs/b") == nothing.format("runs/b")
    Path("runs/b/rollouts").mkdir()
    assert error("runs/b") == nothing.format("runs/b")
    Path("empty.jsonl").write_text("")
    assert error("empty.jsonl") == nothing.format("empty.jsonl")
    with pytest.raises(DataError, match=r"step-000012\.jsonl:1: no JSON"):
        (run / "rollouts/step-000012.jsonl").write_text("x\n")
        main([str(run)])
    with pytest.raises(ConfigError, match="expected: one of 2"):
        main(["runs/a/rollouts/step-000002.jsonl", "--step", "12"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "argument --limit: '0' is not an integer from 1"),
        (["--sort", "length"], "argument --sort: invalid choice: 'length' (choose from"),
        (["--step", "x"], "argument --step: invalid int value: 'x'"),
    ],
)
def test_wrong_options_exit_2(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(run), *arguments])
    assert caught.value.code == 2
    assert f"distillkit rollouts: error: {message}" in capsys.readouterr().err


def test_help_says_what_the_options_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "those whose tokens the teacher dislikes most first" in re.sub(r"\s+", " ", capsys.readouterr().out)
