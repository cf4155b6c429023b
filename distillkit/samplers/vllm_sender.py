"""The trainer's end of a weight transfer: tensors over TCP to every worker of a server."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from distillkit.samplers.vllm_weights import Piece

__all__ = ["WeightSender"]


class WeightSender:
    """Offers tensors once to `readers` workers, each of which has to show the key of this offer.

    Use it as a context manager: the socket is open inside. `delivery` goes to the workers by another way, that of
    vLLM's `update_weights`.

    Args:
        pieces: what to send, in this order.
        host: the address of this machine that workers connect to.
        readers: workers that will connect.
        timeout_s: longest wait for a connection, and for a worker that does not read on.
    """

    def __init__(self, pieces: Sequence[Piece], *, host: str, readers: int, timeout_s: float) -> None:
        self._pieces = pieces
        self._host = host
        self._readers = readers
        self._timeout = timeout_s
        self._key = secrets.token_hex(16)
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self._listener = socket.create_server((self._host, 0), backlog=self._readers)
        self._listener.settimeout(0.2)
        self._thread = threading.Thread(target=self._serve, name="weights", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._listener.close()

    def delivery(self, *, complete: bool) -> dict[str, Any]:
        """What a worker has to know to fetch the tensors; `complete`: these are all the weights there are."""
        pieces = [
            {
                "name": piece.name,
                "part": piece.part,
                "dtype": str(piece.tensor.dtype).removeprefix("torch."),
                "shape": list(piece.tensor.shape),
                "scale": piece.scale,
            }
            for piece in self._pieces
        ]
        host, port = self._listener.getsockname()[:2]
        return {
            "host": host,
            "port": port,
            "key": self._key,
            "timeout_s": self._timeout,
            "complete": complete,
            "pieces": pieces,
        }

    def _serve(self) -> None:
        senders: list[threading.Thread] = []
        deadline = time.monotonic() + self._timeout
        while not self._closing.is_set() and time.monotonic() < deadline and len(senders) < self._readers:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                senders.append(threading.Thread(target=self._send, args=(connection,), daemon=True))
                senders[-1].start()
        for sender in senders:
            sender.join()

    def _send(self, connection: socket.socket) -> None:
        # What goes wrong here the worker sees as a short stream, and reports.
        with connection, contextlib.suppress(OSError):
            connection.settimeout(self._timeout)
            key = connection.recv(16, socket.MSG_WAITALL)
            if not secrets.compare_digest(key, bytes.fromhex(self._key)):
                return
            for piece in self._pieces:
                flat = piece.tensor.detach().to("cpu").contiguous().reshape(-1)
                if flat.numel():
                    connection.sendall(flat.view(torch.uint8).numpy().data)
