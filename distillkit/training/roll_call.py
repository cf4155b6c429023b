"""Who is still there: every rank keeps a TCP connection to rank 0, which the system closes when a process ends."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Gone", "Hub", "Member", "RollCall"]

_CONNECT_S = 30.0
_SEND_S = 5.0
_SILENT_S = 30
"""Without an answer from the other machine's system for so many seconds, it is gone (its power, or its network)."""
_LONGEST = 65_536


@dataclass(frozen=True)
class Gone:
    """A rank that ended before the run did; `said` is its error, None when it ended without a word."""

    rank: int
    host: str
    said: str | None = None


class RollCall(threading.Thread):
    """Listens until a rank is gone, which it tells once, or until all have left in order.

    Args:
        on_gone: called in this thread with the first rank that is gone.
    """

    def __init__(self, on_gone: Callable[[Gone], None]) -> None:
        super().__init__(daemon=True, name="roll-call")
        self._on_gone = on_gone

    @abstractmethod
    def leave(self, said: str | None = None) -> None:
        """Tell the others that this rank ends: in order, or because of the error `said`."""


class Hub(RollCall):
    """Rank 0: takes the connections of the others, who need its `port` and `token`."""

    def __init__(self, on_gone: Callable[[Gone], None]) -> None:
        super().__init__(on_gone)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._members: dict[socket.socket, Gone] = {}
        self._lock = threading.Lock()
        self._door, self._closed = socket.socketpair()
        _close_in_forks(self._listener)

    def leave(self, said: str | None = None) -> None:
        self._tell({"left": True} if said is None else {"gone": asdict(Gone(0, socket.gethostname(), said))})
        self._door.close()

    def run(self) -> None:
        buffers: dict[socket.socket, bytearray] = {}
        with selectors.DefaultSelector() as selector, self._listener:
            for readable in (self._listener, self._closed):
                selector.register(readable, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    connection: Any = key.fileobj
                    if connection is self._closed:
                        for member in buffers:
                            member.close()
                        return
                    if connection is self._listener:
                        connection = _prepared(self._listener.accept()[0])
                        buffers[connection] = bytearray()
                        selector.register(connection, selectors.EVENT_READ)
                    elif not self._heard(connection, buffers[connection]):
                        selector.unregister(connection)
                        connection.close()

    def _heard(self, connection: socket.socket, buffer: bytearray) -> bool:
        """Read what there is; whether the connection goes on."""
        try:
            received = connection.recv(_LONGEST)
        except OSError:
            received = b""
        if not received:
            self._ends(connection, None)
            return False
        buffer += received
        while b"\n" in buffer:
            line, _, rest = buffer.partition(b"\n")
            buffer[:] = rest
            message = _read(line)
            if connection not in self._members:
                # a stranger, a new member, or one that this rank no longer listens to
                if not secrets.compare_digest(str(message.get("token", "")).encode(), self.token.encode()):
                    return False
                with self._lock:
                    self._members[connection] = Gone(int(message["rank"]), str(message["host"]))
                    _send(connection, {"welcome": True})
            elif "gone" in message:
                self._ends(connection, str(message["gone"]))
                return False
            elif "left" in message:
                with self._lock:
                    self._members.pop(connection, None)
                return False
        return len(buffer) <= _LONGEST

    def _ends(self, connection: socket.socket, said: str | None) -> None:
        with self._lock:
            member = self._members.pop(connection, None)
        if member is not None:
            gone = Gone(member.rank, member.host, said)
            self._tell({"gone": asdict(gone)})
            self._on_gone(gone)

    def _tell(self, message: dict[str, Any]) -> None:
        """Say the one thing there is to say; whoever ends after that is not missed."""
        with self._lock:
            for connection in self._members:
                _send(connection, message)
            self._members = {}


class Member(RollCall):
    """Another rank: connected to rank 0, from which it hears of all.

    Args:
        on_gone: see `RollCall`.
        address: host name or address of rank 0.
        port: of rank 0's `Hub`.
        token: of rank 0's `Hub`.
        rank: this one.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, on_gone: Callable[[Gone], None], *, address: str, port: int, token: str, rank: int) -> None:
        super().__init__(on_gone)
        self._address = address
        self._socket = _prepared(socket.create_connection((address, port), timeout=_CONNECT_S))
        self._left = False
        self._lines = self._socket.makefile("rb")
        _send(self._socket, {"token": token, "rank": rank, "host": socket.gethostname()})
        if "welcome" not in _read(self._lines.readline(_LONGEST)):
            raise ConnectionError(f"{address} closed the connection")
        self._socket.settimeout(None)

    def leave(self, said: str | None = None) -> None:
        self._left = True
        _send(self._socket, {"gone": said} if said is not None else {"left": True})

    def run(self) -> None:
        with self._socket, self._lines:
            try:
                message = _read(self._lines.readline(_LONGEST))
            except OSError:
                message = {}
        if "gone" in message:
            self._on_gone(Gone(**message["gone"]))
        elif "left" not in message and not self._left:
            self._on_gone(Gone(0, self._address))


def _prepared(connection: socket.socket) -> socket.socket:
    """Let the system ask an idle connection's other end whether it is there."""
    connection.settimeout(_SEND_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {
        "TCP_KEEPIDLE": _SILENT_S // 3,
        "TCP_KEEPINTVL": _SILENT_S // 6,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * _SILENT_S,
    }.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _close_in_forks(connection)
    return connection


def _close_in_forks(opened: socket.socket) -> None:
    """A forked worker that outlives its rank must not keep the connection open."""
    os.register_at_fork(after_in_child=opened.close)


def _send(connection: socket.socket, message: dict[str, Any]) -> bool:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # it is gone: whoever reads from it notices
        return False
    return True


def _read(line: bytes | bytearray) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
