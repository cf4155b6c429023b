"""Requests against a real server that is down, slow, broken, or busy."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

import pytest

from distillkit.errors import ConfigError, ScoringError
from distillkit.rewards.gsrm.chat_client import ChatClient, server_address
from distillkit.rewards.gsrm.chat_model import Reply
from distillkit.rewards.gsrm.decomposer import Undecided
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says

HELLO = [{"role": "user", "content": "hello"}]
OK = says("fine")


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
        "not asked, since the server is down",
    }
    assert len(results) == 200 and all(isinstance(r, Undecided) and not r.lasting for r in results)
    assert len(caplog.records) == 1


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
        monkeypatch.setattr(made, "_answer", lambda http, entries: _raise(next(turns)))
        made.ask([HELLO], max_tokens=1)
        made.close()

    def _raise(answer: Answer) -> Reply:
        from distillkit.rewards.gsrm.chat_client import _Failure, _seconds

        raise _Failure("x", again=True, pause=_seconds(answer.headers.get("retry-after")))

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
