"""Requests against a real server that is down, slow, broken, or busy."""

from __future__ import annotations

import gzip
import json
import threading
import time
from typing import Any

import pytest

from distillkit.errors import ConfigError, ScoringError
from distillkit.rewards.gsrm.chat_client import NOT_ASKED, ChatClient, server_address
from distillkit.rewards.gsrm.chat_model import Reply
from distillkit.rewards.gsrm.chat_request import Failure, _seconds
from distillkit.rewards.gsrm.decomposer import Undecided
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says

HELLO = [{"role": "user", "content": "hello"}]
OK = says("fine")
LATE = "no answer within 0.15 s"


def client(url: str, **options: Any) -> ChatClient:
    settings: dict[str, Any] = {
        "base_url": url, "model": "m", "api_key_env": None, "timeout_s": 5.0, "retries": 2, "backoff_s": 0.0,
        "concurrency": 4, "extra_body": None, "where": "here", **options,
    }  # fmt: skip
    made = ChatClient(**settings)
    made.open()
    return made


def ask(url: str, count: int = 1, **options: Any) -> list[Reply | Undecided]:
    made = client(url, **options)
    try:
        return made.ask([HELLO] * count, max_tokens=7)
    finally:
        made.close()


def test_a_request_is_what_openai_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-123")
    with chat_server([OK]) as server:
        assert ask(server.url, api_key_env="SOME_KEY") == [Reply(text="fine", finished=True)]
        assert ask(server.url + "/v1/") == [Reply(text="fine", finished=True)]
    first, second = server.asked
    assert first.path == second.path == "/v1/chat/completions"
    assert first.body == {"model": "m", "messages": HELLO, "temperature": 0.0, "max_tokens": 7}
    assert first.headers["Authorization"] == "Bearer sk-123" and "Authorization" not in second.headers
    assert first.headers["Content-Type"] == "application/json"


def test_replies_keep_the_order_of_the_questions() -> None:
    def answers(body: Any, number: int) -> Answer:
        word = body["messages"][0]["content"]
        given = says(word.upper())
        return Answer(given.body, delay=0.05 if word == "a" else 0.0)

    with chat_server(answers) as server:
        made = client(server.url)
        replies = made.ask([[{"role": "user", "content": word}] for word in "abcdef"], max_tokens=1)
        made.close()
    assert [r.text for r in replies if isinstance(r, Reply)] == list("ABCDEF")
    assert 2 <= server.at_once <= 4


def test_extra_entries_are_merged_and_null_takes_one_out() -> None:
    with chat_server([OK]) as server:
        ask(server.url, extra_body={"max_tokens": None, "max_completion_tokens": 9, "top_k": 1})
    assert server.asked[0].body == {
        "model": "m", "messages": HELLO, "temperature": 0.0, "max_completion_tokens": 9, "top_k": 1,
    }  # fmt: skip


def test_a_cut_reply_is_known_as_cut() -> None:
    with chat_server([says("half", finish_reason="length")]) as server:
        assert ask(server.url) == [Reply(text="half", finished=False)]


def test_a_compressed_answer_is_read() -> None:
    body = gzip.compress(json.dumps(OK.body).encode())
    with chat_server([Answer(body, headers={"Content-Encoding": "gzip"})]) as server:
        assert ask(server.url) == [Reply(text="fine", finished=True)]


@pytest.mark.parametrize(
    "bad",
    [
        Answer({"error": "overloaded"}, status=500),
        Answer({"error": "overloaded"}, status=503),
        Answer("slow down", status=429),
        Answer(b"{not json"),
        Answer(b""),
        Answer(b"\xff\xfe"),
        Answer({"choices": []}),
        Answer([1, 2]),
        Answer("text"),
        Answer({"choices": [{"message": {"role": "assistant", "content": None}}]}),
        Answer({"choices": [{"message": {"role": "assistant", "content": [{"type": "text"}]}}]}),
        Answer(b'{"choices": [', headers={"Content-Length": "400"}),
    ],
    ids=lambda answer: f"{answer.status} {answer.body!r:.30}",
)
def test_a_failure_that_may_pass_is_tried_again(bad: Answer) -> None:
    with chat_server([bad, bad, OK]) as server:
        assert ask(server.url, timeout_s=0.3) == [Reply(text="fine", finished=True)]
        assert len(server.asked) == 3
    with chat_server([bad]) as server:
        [given_up] = ask(server.url, timeout_s=0.3)
        assert isinstance(given_up, Undecided) and not given_up.lasting
        assert len(server.asked) == 3  # no more than retries + 1


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_a_failure_that_stays_is_not_tried_again(status: int) -> None:
    with chat_server([Answer({"error": "no"}, status=status, headers={"Location": "/elsewhere"})]) as server:
        assert ask(server.url) == [Undecided(reason=f"HTTP {status}", detail='{"error": "no"}', lasting=False)]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (Answer(b"{oops"), "an answer that is not JSON", "{oops"),
        (Answer({"choices": []}), "an answer without choices[0].message.content", '{"choices": []}'),
        (says(None), "an answer without text", "content is null"),
        (Answer("a\nb", status=500), "HTTP 500", '"a\\nb"'),
        (Answer(OK.body, delay=1.0), "no answer within 0.2 s", "ReadTimeout"),
        (Answer(OK.body, drip=0.1), "no whole answer within 0.2 s", ""),
    ],
)
def test_the_reason_is_kept(answer: Answer, reason: str, detail: str, caplog: pytest.LogCaptureFixture) -> None:
    with chat_server([answer]) as server:
        start = time.monotonic()
        results = ask(server.url, count=3, retries=1, timeout_s=0.2)
        assert time.monotonic() - start < 1.5
    assert results == [Undecided(reason=reason, detail=detail, lasting=False)] * 3
    whole = f"{reason}: {detail}" if detail else reason
    once = "not scored, and counted. Said once for each kind of failure"
    said = f"{server.url}/v1/chat/completions: {whole} (2 tries); {once}"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [said]


def test_a_server_that_is_down_costs_one_round_of_tries(caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    results = ask(nobody(), count=200, retries=3, backoff_s=0.05, concurrency=2)
    assert time.monotonic() - start < 5.0  # 0.35 s of pauses, not 200 / 2 times as much
    assert {r.reason for r in results if isinstance(r, Undecided)} == {
        "cannot connect",
        NOT_ASKED,
    }
    assert len(results) == 200 and all(isinstance(r, Undecided) and not r.lasting for r in results)
    assert len(caplog.records) == 1


def not_asked(results: list[Reply | Undecided]) -> int:
    return sum(isinstance(r, Undecided) and r.reason == NOT_ASKED for r in results)


def test_a_server_that_hangs_costs_a_round_and_then_a_request_a_call() -> None:
    hanging = threading.Event()
    hanging.set()

    def answers(body: Any, number: int) -> Answer:
        return Answer(OK.body, delay=2.0 if hanging.is_set() else 0.0)

    with chat_server(answers) as server:
        made = client(server.url, concurrency=8, timeout_s=0.3, retries=1)
        start = time.monotonic()
        results = made.ask([HELLO] * 64, max_tokens=7)
        assert time.monotonic() - start < 2.0  # not 64 / 8 · 2 tries = 4.8 s
        assert 64 - 16 <= not_asked(results) <= 64 - 8 and all(isinstance(r, Undecided) for r in results)

        asked, start = len(server.asked), time.monotonic()
        results = made.ask([HELLO] * 64, max_tokens=7)
        assert time.monotonic() - start < 1.0
        assert (
            results == [Undecided(reason=NOT_ASKED, detail="no answer within 0.3 s: ReadTimeout", lasting=False)] * 64
        )
        assert [a.body["max_tokens"] for a in server.asked[asked:]] == [1]

        hanging.clear()
        asked = len(server.asked)
        assert made.ask([HELLO] * 9, max_tokens=7) == [Reply(text="fine", finished=True)] * 9
        assert made.ask([HELLO] * 9, max_tokens=7) == [Reply(text="fine", finished=True)] * 9
        assert sorted(a.body["max_tokens"] for a in server.asked[asked:]) == [1, *[7] * 18]
        made.close()


def test_what_was_answered_before_the_server_hung_is_kept() -> None:
    """Two late answers in a row are an outage where requests go one by one, without retries."""
    late = [False, True, False, True, True, False, False, False]

    def answers(body: Any, number: int) -> Answer:
        return Answer(OK.body, delay=1.0 if late[number] else 0.0)

    with chat_server(answers) as server:
        results = ask(server.url, count=8, concurrency=1, retries=0, timeout_s=0.15)
    assert ["ok" if isinstance(r, Reply) else r.reason for r in results] == [
        "ok", LATE, "ok", LATE, LATE, *[NOT_ASKED] * 3
    ]  # fmt: skip


def test_one_conversation_that_takes_too_long_is_no_outage() -> None:
    def answers(body: Any, number: int) -> Answer:
        return Answer(OK.body, delay=1.0 if body["messages"][0]["content"] == "long" else 0.0)

    with chat_server(answers) as server:
        made = client(server.url, concurrency=1, retries=1, timeout_s=0.15)
        results = made.ask([[{"role": "user", "content": word}] for word in ("a", "long", "b")], max_tokens=7)
        made.close()
    assert [isinstance(r, Reply) for r in results] == [True, False, True]


def test_a_lone_conversation_without_an_answer_is_an_outage() -> None:
    with chat_server([Answer(OK.body, delay=1.0)]) as server:
        made = client(server.url, retries=1, timeout_s=0.15)
        assert not_asked(made.ask([HELLO], max_tokens=7)) == 0
        assert not_asked(made.ask([HELLO], max_tokens=7)) == 1
        made.close()
    assert [a.body["max_tokens"] for a in server.asked] == [7, 7, 1]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everything_is_not_asked_on(status: int) -> None:
    wrong = threading.Event()
    wrong.set()

    with chat_server(lambda body, number: Answer("no", status=status) if wrong.is_set() else OK) as server:
        made = client(server.url, concurrency=2)
        results = made.ask([HELLO] * 50, max_tokens=7)
        assert 1 <= len(server.asked) <= 2
        assert results[0] == Undecided(reason=f"HTTP {status}", detail='"no"', lasting=False)
        refused = Undecided(reason=NOT_ASKED, detail=f'HTTP {status}: "no"', lasting=False)
        assert results[2:] == [refused] * 48
        assert [r.status for r in results if isinstance(r, Undecided)] == [status] * 50
        assert made.ask([HELLO] * 50, max_tokens=7) == [refused] * 50
        assert server.asked[-1].body["max_tokens"] == 1
        wrong.clear()
        assert made.ask([HELLO] * 3, max_tokens=7) == [Reply(text="fine", finished=True)] * 3
        made.close()


def test_one_refused_request_among_answered_ones_ends_nothing() -> None:
    with chat_server([OK, Answer("a word I do not like", status=403), OK]) as server:
        results = ask(server.url, count=3, concurrency=1)
    assert [isinstance(r, Reply) for r in results] == [True, False, True]


def test_a_server_that_is_down_is_tried_once_in_the_next_call() -> None:
    made = client(nobody(), retries=2, backoff_s=0.3)
    made.ask([HELLO] * 20, max_tokens=7)
    start = time.monotonic()
    results = made.ask([HELLO] * 20, max_tokens=7)
    assert time.monotonic() - start < 0.6  # not 0.3 + 0.6 s of pauses
    assert not_asked(results) == 20
    assert all(isinstance(r, Undecided) and r.detail.startswith("cannot connect: ") for r in results)
    made.close()


def probe(url: str, **options: Any) -> None:
    made = client(url, **options)
    try:
        made.probe()
    finally:
        made.close()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            401,
            'here.api_key_env: the server cannot be used\n    got:      {url}/v1/chat/completions: HTTP 401: "no ***"\n'
            "    expected: a key that the server takes\n"
            "    try:      name the environment variable that holds the right one",
        ),
        (
            403,
            'here.api_key_env: the server cannot be used\n    got:      {url}/v1/chat/completions: HTTP 403: "no ***"\n'
            "    expected: a key that the server takes\n"
            "    try:      name the environment variable that holds the right one",
        ),
        (
            404,
            'here.model: the server cannot be used\n    got:      {url}/v1/chat/completions: HTTP 404: "no ***"\n'
            "    expected: a name and a path that the server knows\n"
            "    try:      the name it serves, or another path in base_url",
        ),
    ],
)
def test_a_probe_finds_wrong_settings(status: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with chat_server([Answer("no sk-secret", status=status)]) as server, pytest.raises(ConfigError) as caught:
        probe(server.url, api_key_env="SOME_KEY")
    assert str(caught.value) == text.format(url=server.url)
    assert len(server.asked) == 1


def test_a_probe_finds_that_nobody_listens() -> None:
    url = nobody()
    with pytest.raises(ConfigError) as caught:
        probe(url)
    first, got, *others = str(caught.value).split("\n")
    assert first == "here.base_url: the server cannot be used"
    assert got.startswith(f"    got:      {url}/v1/chat/completions: cannot connect: ")
    assert others == ["    expected: a server that listens", "    try:      start it first, or another address"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer("busy", status=503), 'HTTP 503: "busy"'),
        (Answer("max_tokens", status=400), 'HTTP 400: "max_tokens"'),
        (Answer(OK.body, delay=1.0), "no answer within 0.2 s: ReadTimeout"),
    ],
)
def test_a_probe_warns_of_what_may_pass(answer: Answer, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with chat_server([answer, OK]) as server:
        made = client(server.url, timeout_s=0.2)
        made.probe()
        assert made.ask([HELLO], max_tokens=7) == [Reply(text="fine", finished=True)]
        made.close()
    warning = f"here: a first request failed, {server.url}/v1/chat/completions: {said}; the run goes on"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [warning]


def test_a_probe_is_content_with_any_answer(caplog: pytest.LogCaptureFixture) -> None:
    """One token of a thinking model is no text."""
    with chat_server([says(None)]) as server:
        probe(server.url)
    assert [a.body["max_tokens"] for a in server.asked] == [1] and not caplog.records


def test_a_server_that_comes_back_is_asked_again_in_the_next_call() -> None:
    with chat_server([Answer(status=500), OK]) as server:
        made = client(server.url, retries=0)
        first, second = made.ask([HELLO], max_tokens=1), made.ask([HELLO], max_tokens=1)
        made.close()
    assert isinstance(first[0], Undecided) and second == [Reply(text="fine", finished=True)]


def test_pauses_grow_and_the_servers_own_wish_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr("distillkit.rewards.gsrm.chat_client.time.sleep", paused.append)

    def served(answers: list[Answer], **options: Any) -> None:
        turns = iter(answers)
        made = client("http://127.0.0.1:1", retries=len(answers) - 1, **options)
        monkeypatch.setattr("distillkit.rewards.gsrm.chat_client.send", lambda *_, **__: _raise(next(turns)))
        made.ask([HELLO], max_tokens=1)
        made.close()

    def _raise(answer: Answer) -> bytes:
        raise Failure("x", again=True, pause=_seconds(answer.headers.get("retry-after")))

    busy = Answer(status=429)
    served([busy] * 8, backoff_s=1.0)
    assert paused == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    paused.clear()
    wishes = ["5", "0", "1e9", "inf", "nan", "-1", "Wed, 21 Oct 2015 07:28:00 GMT"]
    served([*(Answer(headers={"retry-after": wish}) for wish in wishes), busy], backoff_s=0.5)
    assert paused == [5.0, 0.0, 60.0, 4.0, 8.0, 16.0, 32.0]


def test_retry_after_of_a_real_answer_is_kept() -> None:
    with chat_server([Answer("busy", status=429, headers={"Retry-After": "0.3"}), OK]) as server:
        start = time.monotonic()
        assert ask(server.url, backoff_s=50.0) == [Reply(text="fine", finished=True)]
        assert 0.3 <= time.monotonic() - start < 3.0


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    with chat_server([Answer({"error": "Incorrect API key provided: sk-secret"}, status=401)]) as server:
        made = client(server.url, api_key_env="SOME_KEY")
        [given_up] = made.ask([HELLO], max_tokens=1)
        made.close()
    assert server.asked[0].headers["Authorization"] == "Bearer sk-secret"
    assert str(given_up) == 'HTTP 401: {"error": "Incorrect API key provided: ***"}'
    assert "sk-secret" not in caplog.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            None,
            "here.api_key_env: the environment variable SOME_KEY is not set\n"
            "    try:      export SOME_KEY=…, or null for a server without keys",
        ),
        (
            "two words",
            "here.api_key_env: the environment variable SOME_KEY holds no key\n"
            "    got:      spaces or characters that a header cannot carry\n    expected: one word",
        ),
        (
            "sk-\u00e9",
            "here.api_key_env: the environment variable SOME_KEY holds no key\n"
            "    got:      spaces or characters that a header cannot carry\n    expected: one word",
        ),
    ],
)
def test_a_key_that_cannot_be_used(value: str | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ConfigError) as caught:
        client("http://localhost", api_key_env="SOME_KEY")
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "address", ["", "localhost:8000", "ftp://host", "http://", "http://host:99999", "http://h?x=1"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        server_address(address, "here")
    assert str(caught.value) == (
        f"here.base_url: no address\n    got:      {address!r}\n    expected: such as http://localhost:8000/v1"
    )


def test_an_address_with_credentials_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        server_address("https://me:secret@host/v1", "here")
    assert str(caught.value) == (
        "here.base_url: credentials in the address\n    expected: none\n"
        "    try:      the name of an environment variable with the key, in api_key_env"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeout_s": 0}, "here.timeout_s\n    got:      0\n    expected: more than 0 seconds"),
        ({"retries": -1}, "here.retries\n    got:      -1\n    expected: at least 0"),
        ({"backoff_s": -0.5}, "here.backoff_s\n    got:      -0.5\n    expected: at least 0 seconds"),
        ({"concurrency": 0}, "here.concurrency\n    got:      0\n    expected: at least 1"),
        ({"model": ""}, "here.model\n    got:      ''\n    expected: the name of a model on the server"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        client("http://localhost", **options)
    assert str(caught.value) == text


def test_lone_surrogates_cross_the_wire_both_ways() -> None:
    with chat_server([Answer(b'{"choices": [{"message": {"content": "a\\ud800b"}}]}')]) as server:
        made = client(server.url)
        [reply] = made.ask([[{"role": "user", "content": "x\ud800"}]], max_tokens=1)
        made.close()
    assert server.last_words == ["x\ud800"]
    assert reply == Reply(text="a?b", finished=True)


def test_asking_before_opening() -> None:
    made = client("http://localhost")
    made.close()
    with pytest.raises(ScoringError) as caught:
        made.ask([HELLO], max_tokens=1)
    assert str(caught.value) == "here: called before setup\n    try:      call setup first"
