"""What the `vllm_server` sampler makes of answers that are none: a server of our own gives them, no vLLM needed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from distillkit.errors import ConfigError, RolloutError
from distillkit.samplers.vllm_client import ServerClient
from distillkit.samplers.vllm_process import server_options
from distillkit.samplers.vllm_remote import RemoteEngine
from distillkit.samplers.vllm_server import VLLMServerSampler
from distillkit.testing import student_info, tiny_student

END, VOCAB, VERSION = 1, 20, "run-1"
Reply = tuple[int, Any]


class Server:
    """Answers POSTs with what `reply(body, count)` returns; `count` counts requests from 1."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply | None]) -> None:
        self.count = 0
        owner, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
                with lock:
                    owner.count += 1
                    count = owner.count
                answer = reply(body, count)
                if answer is None:
                    self.connection.close()
                    return
                content = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[dict[str, Any], int], Reply | None]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """A right answer: completions of 3 tokens with an end, or of `max_tokens` without."""
    choices = []
    for i in range(body["sampling_params"]["n"]):
        ids = [5, 6, END] if i % 2 else [7] * body["sampling_params"]["max_tokens"]
        choices.append(
            {
                "index": i,
                "token_ids": ids,
                "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in ids]},
                "finish_reason": "stop" if i % 2 else "length",
                "weight_versions": [{"version": VERSION, "start": 0, "end": len(ids)}],
            }
        )
    return {"prompt_token_ids": body["token_ids"], "choices": choices[::-1]}


SETTINGS = {"n": 2, "max_tokens": 4, "stop_token_ids": [END]}


def engine(url: str, **arguments: Any) -> RemoteEngine:
    sampler = VLLMServerSampler(url=url, **{"retry_s": 0.5, "timeout_s": 20.0, **arguments})
    remote = RemoteEngine(sampler)
    remote.adopt({"url": url, "version": VERSION, "limit": 64, "vocab": VOCAB, "host": "a"})
    return remote


def test_a_server_of_rank_0_is_for_one_machine() -> None:
    remote = RemoteEngine(VLLMServerSampler())
    with pytest.raises(
        ConfigError, match="null starts a server for the ranks of one machine\n    got:      rank 0 on a,"
    ):
        remote.adopt({"url": "http://127.0.0.1:1", "version": VERSION, "limit": 64, "vocab": VOCAB, "host": "a"})


def test_completions_come_back_by_their_place(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, _: (200, answer(body)))
    got = dict(engine(server.url).generate([[2, 3], [4]], [SETTINGS, {**SETTINGS, "n": 1}]))
    assert [[c.ids for c in got[place]] for place in (0, 1)] == [[(7, 7, 7, 7), (5, 6, END)], [(7, 7, 7, 7)]]
    assert [c.stopped for c in got[0]] == [False, True] and got[0][1].logprobs == (-0.5,) * 3


def test_a_group_is_given_as_soon_as_its_answer_is_there(serve: Callable[..., Server]) -> None:
    consumed = threading.Event()

    def reply(body: dict[str, Any], _: int) -> Reply:
        if body["token_ids"] == [2]:
            consumed.wait(20)
        return 200, answer(body)

    groups = engine(serve(reply).url).generate([[2], [3]], [SETTINGS, SETTINGS])
    assert next(groups)[0] == 1  # while the first request is not answered
    consumed.set()
    assert next(groups)[0] == 0


def test_a_consumer_that_stops_early_breaks_off_what_is_under_way(serve: Callable[..., Server]) -> None:
    stop = threading.Event()

    def reply(body: dict[str, Any], _: int) -> Reply:
        if body["token_ids"] == [2]:
            stop.wait(60)
        return 200, answer(body)

    groups = engine(serve(reply).url).generate([[2], [3]], [SETTINGS, SETTINGS])
    assert next(groups)[0] == 1
    groups.close()  # type: ignore[attr-defined]
    assert not stop.is_set() and not [t for t in threading.enumerate() if t.name == "vllm requests"]
    stop.set()


def test_what_is_under_way_is_broken_off_from_another_thread(serve: Callable[..., Server]) -> None:
    asked, stop = threading.Event(), threading.Event()

    def reply(body: dict[str, Any], _: int) -> Reply:
        asked.set()
        stop.wait(60)
        return 200, answer(body)

    remote = engine(serve(reply).url)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(list, remote.generate([[2]], [SETTINGS]))
        assert asked.wait(20)
        remote.break_off()
        with pytest.raises(RolloutError, match="sampling was ended"):
            pending.result(timeout=20)
        assert not stop.is_set()
    with pytest.raises(RolloutError, match="sampling was ended"):
        list(remote.generate([[2]], [SETTINGS]))
    stop.set()


@pytest.mark.parametrize("failure", [(503, {"error": {"message": "starting"}}), (500, {}), None], ids=str)
def test_a_failure_that_passes_is_waited_out(serve: Callable[..., Server], failure: Reply | None) -> None:
    server = serve(lambda body, count: failure if count < 3 else (200, answer(body)))
    assert [place for place, _ in engine(server.url, retry_s=20).generate([[2]], [SETTINGS])] == [0]
    assert server.count == 3


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        ((503, {"error": {"message": "EngineCore died"}}), "HTTP 503: EngineCore died; tried again for"),
        (None, "tried again for"),
    ],
    ids=["503", "closed"],
)
def test_a_failure_that_stays_ends_in_an_error(serve: Callable[..., Server], failure: Reply | None, text: str) -> None:
    server = serve(lambda body, _: (200, answer(body)) if body["token_ids"] == [3] else failure)
    with pytest.raises(RolloutError) as caught:
        list(engine(server.url).generate([[2], [3]], [SETTINGS, SETTINGS]))
    assert "model.sampler: the vLLM server gives no rollouts\n" in str(caught.value)
    assert text in str(caught.value) and server.url in str(caught.value)


def test_a_server_that_never_answers_ends_in_an_error(serve: Callable[..., Server]) -> None:
    stop = threading.Event()

    def reply(body: dict[str, Any], _: int) -> Reply:
        stop.wait(60)
        return 200, answer(body)

    server = serve(reply)
    with pytest.raises(RolloutError, match="ReadTimeout; tried again for"):
        list(engine(server.url, timeout_s=0.3, retry_s=0.3).generate([[2]], [SETTINGS]))
    assert not stop.is_set()
    stop.set()


def test_a_refusal_is_not_repeated(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, _: (403, {"error": {"message": "Restart vllm serve with --enable-scale-out"}}))
    with pytest.raises(RolloutError, match="HTTP 403: Restart vllm serve with --enable-scale-out"):
        list(engine(server.url).generate([[2]], [SETTINGS]))
    assert server.count == 1


def test_a_server_that_ended_is_not_waited_for() -> None:
    client = ServerClient("http://127.0.0.1:9", concurrency=1, timeout_s=5, retry_s=10**6, ended=lambda: "exit code -9")
    with pytest.raises(Exception, match="exit code -9"):
        list(client.each("/x", [{}]))


def _first(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(reply: dict[str, Any]) -> None:
        reply["choices"][-1][name] = value  # of the completion at index 0: four tokens, cut

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.update(prompt_token_ids=[2, 3, 4]), "an answer to 3 other prompt tokens than were sent"),
        (lambda r: r["choices"].pop(), "1 completions instead of 2"),
        (_first("token_ids", [7, 7, 7]), "log-probs of other tokens than were sampled"),
        (_first("token_ids", []), "0 tokens of 4"),
        (_first("token_ids", [7, 7, 7, VOCAB]), f"token ids from outside the {VOCAB} of the student"),
        (_first("token_ids", None), "NoneType"),
        (_first("logprobs", None), "NoneType"),
        (_first("finish_reason", "abort"), "a completion that ended with 'abort'"),
        (_first("finish_reason", "stop"), "a completion that runs past its end token"),
        (_first("weight_versions", [{"version": "default"}]), f"weights ['default'] instead of {VERSION}"),
        (lambda r: r.pop("choices"), "no 'choices'"),
    ],
)
def test_an_answer_that_does_not_fit_the_request_is_refused(
    serve: Callable[..., Server], change: Callable[[dict[str, Any]], None], text: str
) -> None:
    def reply(body: dict[str, Any], _: int) -> Reply:
        right = answer(body)
        change(right)
        return 200, right

    with pytest.raises(RolloutError) as caught:
        list(engine(serve(reply).url).generate([[2, 3]], [SETTINGS]))
    assert "model.sampler: the vLLM server's answer is not one to the request\n" in str(caught.value)
    assert text in str(caught.value)


def test_an_address_where_nothing_answers_is_refused_in_time() -> None:
    sampler = VLLMServerSampler(url="http://127.0.0.1:9", retry_s=0.5)
    sampler.setup(student_info())
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        sampler.sync(tiny_student())
    assert time.monotonic() - started < 30
    text = str(caught.value)
    assert "model.sampler.url: no vLLM server answers at http://127.0.0.1:9\n    got:      none within 0.5 s\n" in text
    assert "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model" in text


def test_something_else_behind_the_address_is_refused(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, _: (200, {}))  # and 501 to every GET

    class Healthy(VLLMServerSampler): ...

    sampler = Healthy(url=server.url, retry_s=0.5)
    sampler.setup(student_info())
    with pytest.raises(ConfigError, match="no vLLM server answers"):
        sampler.sync(tiny_student())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": "localhost:8000"}, "model.sampler.url\n    got:      localhost:8000\n    expected: http://HOST:PORT"),
        ({"retry_s": 0.0}, "model.sampler.retry_s\n    got:      0.0\n    expected: above 0"),
        ({"concurrency": 0}, "model.sampler.concurrency\n    got:      0\n    expected: above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VLLMServerSampler(**arguments)
    assert text in str(caught.value)


def test_before_sync_there_is_nothing_to_sample_with() -> None:
    with pytest.raises(RolloutError, match=r"expected: setup\(info\) and sync\(student\) before it"):
        VLLMServerSampler().sample([])


def test_options_of_a_server() -> None:
    assert server_options({"tensor_parallel_size": 2, "hf_overrides": {"a": 1}, "x": False, "y": None}) == [
        "--tensor-parallel-size", "2", "--hf-overrides", '{"a": 1}', "--no-x",
    ]  # fmt: skip
