"""When a server that fails is not asked further."""

from __future__ import annotations

import threading

from distillkit.rewards.gsrm.chat_request import Failure

__all__ = ["Outage"]


class Outage:
    """What the requests of one call know of each other: whether the server is worth asking on, and if not, why.

    It is not, once a request has found nobody listening in all its tries; once a request is `refused` and none was
    answered (one that is refused among answered ones is that request's own trouble); and once `late` answers in a row,
    without any answer in between, are as many as requests run at a time and as two conversations have tries: one trace
    that takes too long does not end the call, also where requests go one by one.

    Args:
        conversations: of the call.
        concurrency: requests at a time.
        tries: of one conversation.
    """

    def __init__(self, *, conversations: int, concurrency: int, tries: int) -> None:
        self.cause: Failure | None = None
        self._limit = min(max(concurrency, 2 * tries), conversations * tries)
        self._late = 0
        self._answered = False
        self._lock = threading.Lock()

    def answered(self) -> None:
        """Note a reply."""
        with self._lock:
            self._late, self._answered = 0, True

    def failed(self, failure: Failure, *, last: bool) -> None:
        """Note a failure; `last`: that conversation is not tried again."""
        with self._lock:
            if failure.fault == "late":
                self._late += 1
            elif failure.status is not None:
                self._late = 0
            ends = {
                "request": False,
                "late": self._late >= self._limit,
                "unreachable": last,
                "refused": not self._answered,
            }[failure.fault]
            if ends and self.cause is None:
                self.cause = failure
