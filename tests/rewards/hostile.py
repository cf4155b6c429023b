"""What a worker may be asked to run: functions that answer, hang, crash or eat memory."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from typing import Any


def act(item: dict[str, Any]) -> Any:
    """Do what `item["do"]` names, with `item["with"]`."""
    return globals()[item["do"]](item.get("with"))


def echo(value: Any) -> Any:
    return value


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def hang_in_python(_: Any) -> None:
    while True:
        pass


def hang_in_c(_: Any) -> None:
    """Backtrack for ever inside one call of the regex engine, which keeps the interpreter's lock."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def segfault(_: Any) -> None:
    ctypes.string_at(0)


def exit_now(code: int) -> None:
    os._exit(code)


def leave(code: int) -> None:
    sys.exit(code)


def eat_memory(megabytes: int) -> int:
    return len(bytearray(megabytes << 20))


def raise_error(text: str) -> None:
    raise ValueError(text)


def recurse(_: Any) -> None:
    recurse(_)


def not_json(_: Any) -> Any:
    return {1, 2}


def chatter(text: str) -> str:
    """Write to both output streams, through Python and past it."""
    print(text, flush=True)
    os.write(1, text.encode())
    os.write(2, text.encode())
    return text


def modules(prefixes: list[str]) -> list[str]:
    """Name the modules of this process that start with one of `prefixes`."""
    return sorted(name for name in sys.modules if name.startswith(tuple(prefixes)))


def slow_to_warm(item: dict[str, Any]) -> Any:
    """Like `act`, after a warm-up item that takes a second."""
    return act(item)
