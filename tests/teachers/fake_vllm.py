"""A server that answers as vLLM does, from a tiny model, and fails on demand."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel

Behaviour = Callable[["FakeVLLM", "Handler", dict[str, Any]], bool]
"""What happens to one scoring request instead of, or (False) before, an answer."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    fake: FakeVLLM

    def setup(self) -> None:
        super().setup()
        self.fake.connections.add(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client may have gone
            super().handle()

    def finish(self) -> None:
        self.fake.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.fake.health_checks += 1
            self.reply(self.fake.health, b"")
        elif self.path == "/v1/models":
            self.reply_json(200, {"object": "list", "data": self.fake.models()})
        else:
            self.refuse(404, "Not Found")

    def do_POST(self) -> None:
        entries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.tokenize(entries["prompt"])
            return
        self.fake.keys.append(self.headers.get("Authorization"))
        with self.fake.lock:
            self.fake.asked.append(tuple(entries["prompt"]))
            behaviour = self.fake.next_behaviour()
        if behaviour is not None and behaviour(self.fake, self, entries):
            return
        status, answer = self.fake.answer(entries)
        self.reply_json(status, answer)
        if status == 200:
            with self.fake.lock:
                self.fake.answered.append(tuple(entries["prompt"]))

    def tokenize(self, text: str) -> None:
        if self.fake.tokenizer is None:
            self.refuse(404, "Not Found")
        else:
            ids = self.fake.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.reply_json(200, {"count": len(ids), "tokens": ids})

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.reply_json(status, {"error": {"message": message, "code": status}}, **headers)

    def reply_json(self, status: int, value: Any, **headers: str) -> None:
        self.reply(status, json.dumps(value).encode(), **headers)

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        """End the connection as a process that is killed does: nothing more is said."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class FakeVLLM:
    """vLLM's answers, computed by transformers.

    `asked` and `answered` are the token ids of the scoring requests, in order. `plan` is what happens to the next ones,
    one behaviour each; `always` to all others.
    """

    def __init__(self, model: PreTrainedModel, *, name: str = "teacher", max_logprobs: int = 64) -> None:
        self.model = model
        self.name = name
        self.max_logprobs = max_logprobs
        self.max_model_len: int | None = 64
        self.tokenizer: Any = None
        self.health = 200
        self.health_checks = 0
        self.asked: list[tuple[int, ...]] = []
        self.answered: list[tuple[int, ...]] = []
        self.keys: list[str | None] = []
        self.plan: list[Behaviour | None] = []
        self.always: Behaviour | None = None
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.dead = threading.Event()
        self._port = 0
        self._httpd: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> FakeVLLM:
        """Listen, at the same address as before."""
        self.dead.clear()
        handler = type("OwnHandler", (Handler,), {"fake": self})
        self._httpd = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._httpd.daemon_threads = True
        self._port = self._httpd.server_port
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def kill(self) -> None:
        """Stop listening and break every connection off."""
        httpd, self._httpd = self._httpd, None
        if httpd is None:
            return
        httpd.shutdown()
        httpd.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.dead.set()

    def start_when_dead(self, **changes: Any) -> None:
        """Listen again, with changed attributes, as soon as it is killed (within a minute)."""

        def start() -> None:
            if self.dead.wait(60):
                vars(self).update(changes)
                self.start()

        threading.Thread(target=start, daemon=True).start()

    def forget(self) -> None:
        """Forget the requests until now (those of the start-up check)."""
        self.asked.clear()
        self.answered.clear()

    def next_behaviour(self) -> Behaviour | None:
        return self.plan.pop(0) if self.plan else self.always

    def models(self) -> list[dict[str, Any]]:
        return [
            {"id": "an-adapter", "parent": self.name, "max_model_len": None},
            {"id": self.name, "parent": None, "max_model_len": self.max_model_len},
        ]

    def answer(self, entries: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of a scoring request."""
        ids, k, size = entries["prompt"], entries["prompt_logprobs"], int(self.model.config.vocab_size)
        refusal = None
        if entries["model"] != self.name:
            return 404, {"error": {"message": f"The model `{entries['model']}` does not exist.", "code": 404}}
        if self.max_model_len is not None and len(ids) + entries["max_tokens"] > self.max_model_len:
            refusal = f"This model's maximum context length is {self.max_model_len} tokens"
        elif k > self.max_logprobs:
            refusal = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
        elif max(ids) >= size:
            refusal = f"Token id {max(ids)} is out of vocabulary"
        if refusal is not None:
            return 400, {"error": {"message": refusal, "code": 400}}
        with torch.no_grad():
            logprobs = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows: list[dict[str, Any] | None] = [None]
        for t in range(1, len(ids)):
            chosen = [ids[t], *logprobs[t - 1].topk(k).indices.tolist()]
            values = logprobs[t - 1].clamp(min=-9999.0)
            rows.append({str(i): {"logprob": float(values[i]), "rank": 1, "decoded_token": "?"} for i in chosen})
        choice = {"index": 0, "text": "?", "prompt_logprobs": rows, "prompt_token_ids": ids}
        return 200, {"id": "cmpl-0", "model": self.name, "choices": [choice]}


def status(code: int, message: str = "out of luck", **headers: str) -> Behaviour:
    """Refuse with an HTTP status."""

    def behave(fake: FakeVLLM, handler: Handler, entries: dict[str, Any]) -> bool:
        handler.refuse(code, message, **headers)
        return True

    return behave


def hang_up(fake: FakeVLLM, handler: Handler, entries: dict[str, Any]) -> bool:
    """Break off without an answer."""
    handler.hang_up()
    return True


def die(fake: FakeVLLM, handler: Handler, entries: dict[str, Any]) -> bool:
    """The server is killed while it works on this request."""
    fake.kill()
    return True


def changed(change: Callable[[dict[str, Any]], None]) -> Behaviour:
    """Answer something else: `change` edits choices[0]."""

    def behave(fake: FakeVLLM, handler: Handler, entries: dict[str, Any]) -> bool:
        code, answer = fake.answer(entries)
        change(answer["choices"][0])
        handler.reply_json(code, answer)
        return True

    return behave


def waits(event: threading.Event) -> Behaviour:
    """Answer after `event` only (a minute at most)."""

    def behave(fake: FakeVLLM, handler: Handler, entries: dict[str, Any]) -> bool:
        event.wait(60)
        return False

    return behave


@contextlib.contextmanager
def running(*fakes: FakeVLLM) -> Iterator[list[FakeVLLM]]:
    """Run servers for a while."""
    try:
        yield [fake.start() for fake in fakes]
    finally:
        for fake in fakes:
            fake.kill()
