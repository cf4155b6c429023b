"""A real HTTP server in a thread that answers chat completions as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server sends: JSON, or bytes as they are, after `delay` seconds, with `drip` seconds between bytes."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0


def says(text: Any, **choice: Any) -> Answer:
    """A chat completion with this text."""
    return Answer({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]})


@dataclass
class Asked:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


@dataclass
class ChatServer:
    """A running server: its address, and what it was asked."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0

    @property
    def last_words(self) -> list[str]:
        """The last message of every request."""
        return [asked.body["messages"][-1]["content"] for asked in self.asked]


@contextlib.contextmanager
def chat_server(answers: Callable[[Mapping[str, Any], int], Answer] | Sequence[Answer]) -> Iterator[ChatServer]:
    """Serve; `answers(body, number of the request)`, or a list that is gone through, its last repeated."""
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.asked)
                server.asked.append(Asked(self.path, dict(self.headers), body))
                running += 1
                server.at_once = max(server.at_once, running)
            try:
                given = answers(body, number) if callable(answers) else answers[min(number, len(answers) - 1)]
                time.sleep(given.delay)
                self._send(given)
            except OSError:
                pass  # the client has gone, as it should when the answer comes too late
            finally:
                with lock:
                    running -= 1

        def _send(self, given: Answer) -> None:
            content = given.body if isinstance(given.body, bytes) else json.dumps(given.body).encode()
            self.send_response(given.status)
            for name, value in {"Content-Length": str(len(content)), **given.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if given.drip:
                for i in range(len(content)):
                    self.wfile.write(content[i : i + 1])
                    self.wfile.flush()
                    time.sleep(given.drip)
            else:
                self.wfile.write(content)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def nobody() -> str:
    """An address where nobody listens."""
    with chat_server([says("")]) as server:
        pass
    return server.url
