"""`distillkit decompose`: traces in, a decomposer's training set out, continued where it stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.decompose import Report, label
from distillkit.cli.main import main
from distillkit.data import DataSource
from distillkit.data.prompts import prepare_prompts
from distillkit.data.sources import read_source
from distillkit.decomposition import Decomposition, ReasoningStep, messages, parse, render
from distillkit.errors import ScoringError
from distillkit.rewards.gsrm.chat_client import NOT_ASKED
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided
from distillkit.testing import char_tokenizer
from tests.rewards.gsrm import markov
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says

FILE = "traces.jsonl"
OUT = "rows.jsonl"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def steps(trace: str) -> Decomposition:
    return Decomposition(steps=(ReasoningStep(meta="m", question=trace, answer="a²"),), final=trace)


def answers(body: Any, number: int) -> Answer:
    trace = body["messages"][-1]["content"].rsplit("\n", 1)[1]
    if trace == "long":
        return says("Step 1", finish_reason="length")
    return says("I would rather not." if trace == "odd" else render(steps(trace)))


def traces(*given: str | None, file: str = FILE) -> str:
    rows = [{"problem": f"problem {i}", "trace": trace} for i, trace in enumerate(given)]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def decompose(*words: str) -> int:
    return main(["decompose", "--input", FILE, "--output", OUT, *words])


def served(url: str, *words: str) -> int:
    return decompose("--server", url, "--model", "m", "--backoff", "0", "--retries", "1", *words)


def rows(file: str = OUT) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_traces_become_rows_for_the_supervised_module(capsys: pytest.CaptureFixture[str]) -> None:
    traces("one", "<think>two</think> 2", "odd", "long", None, "</think>", "one")
    with chat_server(answers) as server:
        assert served(server.url, "--max-new-tokens", "99", "--concurrency", "2") == 0
    assert capsys.readouterr().out == (
        "rows.jsonl: 7 rows: 3 written, 4 left out\n"
        "       2  the trace is empty\n"
        "       1  not a decomposition\n"
        "       1  a decomposition longer than max_new_tokens\n"
    )
    written = rows()
    assert [row["prompt"] for row in written] == [
        messages("problem 0", "one"),
        messages("problem 1", "two"),
        messages("problem 6", "one"),
    ]
    assert [parse(row["completion"]) for row in written] == [steps("one"), steps("two"), steps("one")]
    assert "a²" in Path(OUT).read_text()
    assert {asked.body["max_tokens"] for asked in server.asked} == {99} and server.at_once <= 2
    source = DataSource(path=OUT)
    prompts = prepare_prompts(read_source(source), source, char_tokenizer(), completions=True)
    assert len(prompts) == 3 and prompts[0].completion_ids


def test_the_same_command_continues(capsys: pytest.CaptureFixture[str]) -> None:
    traces("one", "two", "odd")
    with chat_server(answers) as server:
        assert served(server.url, "--limit", "1") == 0
        assert served(server.url) == 0
        asked = [words.rsplit("\n", 1)[1] for words in server.last_words]
        assert asked[0] == "one" and sorted(asked[1:]) == ["odd", "two"]  # these two at once
        assert served(server.url) == 0
    assert len(rows()) == 2
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("rows")] == [
        "rows.jsonl: 1 rows: 1 written",
        "rows.jsonl: 3 rows: 1 written, 1 there before, 1 left out",
        "rows.jsonl: 3 rows: 0 written, 2 there before, 1 left out",
    ]
    assert server.last_words[-1].endswith("odd") and len(server.asked) == 4


def test_a_line_that_a_kill_cut_off_is_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    traces("one", "two", "three")
    with chat_server(answers) as server:
        assert served(server.url) == 0
        whole = Path(OUT).read_bytes()
        lines = whole.splitlines(keepends=True)
        for cut in (1, len(lines[2]) // 2, len(lines[2]) - 1):
            Path(OUT).write_bytes(b"".join(lines[:2]) + lines[2][:cut])
            before = len(server.asked)
            assert served(server.url) == 0
            assert len(server.asked) == before + 1
            assert Path(OUT).read_bytes() == whole


def test_a_server_that_goes_away_stops_the_command_and_keeps_what_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    traces(*(f"trace {i}" for i in range(6)))

    def failing(body: Any, number: int) -> Answer:
        return answers(body, number) if number < 4 else Answer("out of memory", status=500)

    with chat_server(failing) as server:
        assert served(server.url, "--chunk", "2", "--concurrency", "1") == 1
        assert len(server.asked) == 4 + 4  # two traces, two tries each
    assert capsys.readouterr().err.endswith(
        "ScoringError: distillkit decompose: the server failed for all of 2 traces\n"
        '    got:      HTTP 500: "out of memory"; 4 rows were written before\n'
        "    expected: a server that answers\n"
        "    try:      run the same command again: what is written is not asked again\n"
    )
    assert len(rows()) == 4
    with chat_server(answers) as server:
        assert served(server.url) == 0
        assert len(server.asked) == 2
    assert len(rows()) == 6
    assert served(nobody()) == 0  # nothing is left to ask


@pytest.mark.parametrize(
    ("answer", "expected", "hint"),
    [
        (
            Answer("wrong key", status=401),
            "a key that the server takes",
            "the right key in the environment variable of --api-key-env",
        ),
        (
            Answer("no such model", status=404),
            "a model and an address that the server knows",
            "check --model and --server",
        ),
        (
            Answer("moved", status=301, headers={"Location": "/"}),
            "a model and an address that the server knows",
            "check --model and --server",
        ),
        (
            Answer("too many tokens", status=400),
            "a request that the server takes",
            "check --model, --max-new-tokens and --extra-body",
        ),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Answer) else "",
)
def test_a_server_that_refuses_is_said_with_what_to_change(
    answer: Answer, expected: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    traces(*(f"trace {i}" for i in range(20)))
    with chat_server([answer]) as server:
        assert served(server.url, "--concurrency", "2") == 1
    assert capsys.readouterr().err.endswith(
        "ScoringError: distillkit decompose: the server failed for all of 20 traces\n"
        f'    got:      HTTP {answer.status}: "{answer.body}"; 0 rows were written before\n'
        f"    expected: {expected}\n    try:      {hint}\n"
    )
    assert len(server.asked) <= 2 or answer.status not in (401, 404)


class Down(Decomposer):
    """The first trace of a call was not asked, the second found out why."""

    def identity(self) -> str:
        return "down"

    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        refused = Undecided(reason="cannot connect", detail="refused", lasting=False)
        return [Undecided(reason=NOT_ASKED, detail="cannot connect: refused", lasting=False), refused][: len(items)]


def test_the_cause_is_said_rather_than_what_was_not_asked(tmp_path: Path) -> None:
    for items, got in (
        ([("p", "a"), ("p", "b")], "cannot connect: refused"),
        ([("p", "a")], "not asked, since the server failed: cannot connect: refused"),
    ):
        with pytest.raises(ScoringError) as caught:
            label(items, Down(), tmp_path / "rows.jsonl")
        assert f"\n    got:      {got}; 0 rows were written before\n" in str(caught.value)


def test_a_server_that_fails_now_and_then_is_worked_around(capsys: pytest.CaptureFixture[str]) -> None:
    traces("one", "two", "three")
    with chat_server(
        lambda body, number: Answer(b"{", 200) if "two" in body["messages"][-1]["content"] else answers(body, number)
    ) as server:
        assert served(server.url) == 0
    assert capsys.readouterr().out == (
        "rows.jsonl: 3 rows: 2 written, 1 left out\n       1  an answer that is not JSON\n"
    )


def test_examples_keys_and_further_entries_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    traces("one")
    monkeypatch.setenv("MY_KEY", "sk-1")
    example = {"problem": "1+1", "trace": "two", "decomposition": render(steps("two"))}
    Path("examples.jsonl").write_text(json.dumps(example))
    with chat_server(answers) as server:
        words = ["--examples", "examples.jsonl", "--api-key-env", "MY_KEY", "--extra-body", '{"seed": 1}']
        assert served(server.url, *words) == 0
    [asked] = server.asked
    assert asked.headers["Authorization"] == "Bearer sk-1" and asked.body["seed"] == 1
    assert [message["role"] for message in asked.body["messages"]] == ["system", "user", "assistant", "user"]
    assert rows()[0]["prompt"] == messages("problem 0", "one")  # trained without the examples
    assert "sk-1" not in Path(OUT).read_text()


def test_a_local_model_and_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = markov.decomposer(tmp_path / "model", {"1": render(steps("t")), "?": "no"})
    given = [{"prompt": [{"role": "user", "content": "3+8>"}], "chain": "1"}, {"prompt": "2>", "chain": "?"}]
    Path(FILE).write_text(json.dumps(given[0]) + "\n" + json.dumps(given[1]))
    words = ["--local", path, "--problem-column", "prompt", "--trace-column", "chain", "--max-new-tokens", "5"]
    assert decompose(*words) == 0
    assert [row["prompt"] for row in rows()] == [messages("3+8>", "1")]
    # DeepSpeed, where it is installed and was not imported before, says first that it found no GPU.
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert printed == ["rows.jsonl: 2 rows: 1 written, 1 left out", "       1  not a decomposition"]


def test_the_embedded_decomposer_as_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"problem": "3*2+4*5>", "trace": "3*2+0>6+0>6"}
    Path(FILE).write_text(json.dumps(row))
    assert decompose("--local", "embedded:decomposer") == 0
    assert capsys.readouterr().out == "rows.jsonl: 1 rows: 1 written\n"
    assert len(parse(rows()[0]["completion"]).steps) == 3
    assert decompose("--local", "embedded:decomposer", "--max-new-tokens", "512") == 2
    assert capsys.readouterr().err.endswith(
        "ConfigError: --max-new-tokens: no room for a trace in the context of embedded:decomposer\n"
        "    got:      512\n    expected: well below 512 tokens\n"
    )


def test_lone_surrogates_of_a_data_file_survive() -> None:
    traces("x \ud800 y")
    with chat_server(lambda body, number: says(render(steps("t")))) as server:
        assert served(server.url) == 0
        assert rows()[0]["prompt"] == messages("problem 0", "x \ud800 y")
        assert served(server.url) == 0
    assert len(rows()) == 1 and len(server.asked) == 1


class Slow(Decomposer):
    """Knows every trace; `busy` is undecided for now."""

    def identity(self) -> str:
        return "slow"

    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        return [Undecided(reason="busy", lasting=False) if t == "busy" else steps(t) for _, t in items]


def test_progress_is_said_and_repeated_items_are_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distillkit.cli.decompose._EVERY_S", 0.0)
    items = [("p", "a"), ("p", "b"), ("p", "a"), ("q", "a"), ("p", "busy")]
    report = label(items, Slow(), tmp_path / "deep" / "rows.jsonl", chunk=2)
    assert (report.rows, report.written, report.repeated, report.before) == (5, 3, 1, 0)
    assert report.left_out == {"busy": 1}
    assert str(report) == "5 rows: 3 written, 1 repeated, 1 left out\n       1  busy"
    said = capsys.readouterr().err.splitlines()
    assert said == ["decompose: 2 of 4 traces, 2 written", "decompose: 4 of 4 traces, 3 written"]
    assert str(Report(rows=0)) == "0 rows: 0 written"
    with pytest.raises(ScoringError):
        label([("p", "busy")], Slow(), tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            [],
            "ConfigError: distillkit decompose: who takes the traces apart?\n"
            "    got:      neither --server nor --local\n"
            "    expected: --server URL --model NAME, or --local PATH\n",
        ),
        (
            ["--server", "http://a", "--local", "p"],
            "ConfigError: distillkit decompose: who takes the traces apart?\n    got:      --server and --local\n"
            "    expected: --server URL --model NAME, or --local PATH\n",
        ),
        (
            ["--server", "http://a"],
            "ConfigError: distillkit decompose: --model is missing\n    expected: the name of a model on the server\n",
        ),
        (
            ["--local", "p", "--examples", "e.jsonl"],
            "ConfigError: distillkit decompose: --examples is for a server\n    got:      --local\n"
            "    try:      --server\n",
        ),
        (
            ["--server", "http://a", "--model", "m", "--extra-body", "[1]"],
            "ConfigError: --extra-body\n    got:      [1]\n    expected: a JSON object\n",
        ),
        (
            ["--server", "http://a", "--model", "m", "--extra-body", "{"],
            "ConfigError: --extra-body: not JSON\n    got:      { (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1))\n",
        ),
        (
            ["--server", "nowhere", "--model", "m"],
            "ConfigError: --server: no address\n    got:      'nowhere'\n"
            "    expected: such as http://localhost:8000/v1\n",
        ),
        (
            ["--server", "http://a", "--model", "m", "--timeout", "0"],
            "ConfigError: --timeout\n    got:      0.0\n    expected: more than 0 seconds\n",
        ),
        (
            ["--server", "http://a", "--model", "m", "--examples", "e.jsonl"],
            "DataError: --examples: cannot be read\n    got:      e.jsonl ([Errno 2] No such file or directory: "
            "'e.jsonl')\n    expected: JSONL\n",
        ),
        (
            ["--server", "http://a", "--model", "m", "--chunk", "0"],
            "ConfigError: --chunk\n    got:      0\n    expected: at least 1\n",
        ),
        (
            ["--server", "http://a", "--model", "m", "--trace-column", "chain"],
            "DataError: --trace-column: traces.jsonl has no column 'chain'\n    got:      chain\n"
            "    expected: problem, trace\n",
        ),
    ],
)
def test_what_cannot_run_is_said_in_full(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    traces("one")
    assert decompose(*words) == 2
    assert capsys.readouterr().err == text
    assert not Path(OUT).exists()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"problem": "", "trace": "t"},
            "DataError: --input: traces.jsonl, line 2, column 'problem': no problem\n    got:      ''\n"
            "    expected: text, or a list of messages\n",
        ),
        (
            {"problem": "p", "trace": 3},
            "DataError: --input: traces.jsonl, line 2, column 'trace': no trace\n    got:      3\n    expected: text\n",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    traces("one")
    with Path(FILE).open("a") as stream:
        stream.write(json.dumps(row))
    assert served("http://127.0.0.1:1") == 2
    assert capsys.readouterr().err == text


def test_another_file_is_not_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    traces("one")
    for content in ('{"question": 1}\n', "text\n", "[]\n"):
        Path(OUT).write_text(content)
        assert served("http://127.0.0.1:1") == 2
        shown = content.strip()
        assert capsys.readouterr().err == (
            f"DataError: --output: rows.jsonl, line 1: not a row of distillkit decompose\n    got:      {shown}\n"
            "    expected: prompt, completion, id\n    try:      another file\n"
        )
        assert Path(OUT).read_text() == content


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["decompose", "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0
    flags = [
        "--input",
        "--output",
        "--server",
        "--model",
        "--local",
        "--problem-column",
        "--trace-column",
        "--examples",
    ]
    assert all(re.search(rf"^  {flag} ", said, re.MULTILINE) for flag in flags)
