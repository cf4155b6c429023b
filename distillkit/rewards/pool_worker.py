"""The child's side of `VerifierPool`: read an item, report that work has started, call the function, send the result.

Started as a script, not as a module, so that nothing of distillkit is imported but what the function itself imports.
Frames are a 4-byte length and JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1


def read_frame(fd: int) -> Any:
    """Return the next JSON value from `fd`, or None when the other side is gone."""
    header = _read_exactly(fd, 4)
    body = header and _read_exactly(fd, struct.unpack(">I", header)[0])
    return json.loads(body) if body else None


def _read_exactly(fd: int, count: int) -> bytes:
    chunks = []
    while count:
        chunk = os.read(fd, min(count, 1 << 20))
        if not chunk:
            return b""
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def frame(value: Any) -> bytes:
    """Return `value` as one frame; JSON in ASCII carries lone surrogates and NUL characters unharmed."""
    body = json.dumps(value).encode("ascii")
    return struct.pack(">I", len(body)) + body


def _write(fd: int, data: bytes | memoryview) -> None:
    data = memoryview(data)
    while data:
        data = data[os.write(fd, data) :]


def _die_with(parent: int, request: int) -> None:
    """Make the kernel kill this process with its parent, even inside C code that never lets another thread run."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        poller = select.poll()
        poller.register(request, 0)
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit(memory_mb: int | None) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_mb is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _resolve(path: str) -> Callable[[Any], Any]:
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{path} is not a function")
    return function  # type: ignore[no-any-return]


def main(request: int, reply: int, parent: int) -> None:
    """Serve items from `request` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent, request)
    setup = read_frame(request)
    if setup is None:
        return
    sys.path[:] = setup["path"]
    _limit(setup["memory_mb"])
    try:
        function = _resolve(setup["function"])
        if setup["warm_up"] is not None:
            function(setup["warm_up"])
    except BaseException:
        _write(reply, frame({"failed": traceback.format_exc(limit=-3)}))
        return
    _write(reply, frame({"ready": True}))
    while (item := read_frame(request)) is not None:
        _write(reply, frame({"started": True}))
        try:
            answer = frame({"value": function(item["payload"])})
        except MemoryError:
            _write(reply, frame({"error": f"MemoryError: more than {setup['memory_mb']} MiB", "leaving": True}))
            return
        except Exception as error:
            answer = frame({"error": f"{type(error).__name__}: {error}"[:500]})
        _write(reply, answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
