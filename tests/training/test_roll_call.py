"""Ranks that hear of each other's end."""

from __future__ import annotations

import queue
import socket

import pytest

from distillkit.training.roll_call import Gone, Hub, Member

HERE = socket.gethostname()


class Call:
    """Rank 0 and two others, in one process; `news` is who heard of whom."""

    def __init__(self) -> None:
        self.news: queue.Queue[tuple[int, Gone]] = queue.Queue()
        self.hub = Hub(lambda gone: self.news.put((0, gone)))
        self.hub.start()
        self.members = {rank: self.member(rank) for rank in (1, 2)}

    def member(self, rank: int) -> Member:
        member = Member(
            lambda gone: self.news.put((rank, gone)),
            address="127.0.0.1",
            port=self.hub.port,
            token=self.hub.token,
            rank=rank,
        )
        member.start()
        return member

    def heard(self, count: int) -> dict[int, Gone]:
        return dict(self.news.get(timeout=20) for _ in range(count))

    def all_ended(self) -> bool:
        for thread in (self.hub, *self.members.values()):
            thread.join(timeout=20)
        return not any(thread.is_alive() for thread in (self.hub, *self.members.values()))


@pytest.fixture
def call() -> Call:
    return Call()


def test_a_rank_that_fails_tells_all_why(call: Call) -> None:
    call.members[2].leave("OSError: no space left")
    assert call.heard(2) == dict.fromkeys((0, 1), Gone(2, HERE, "OSError: no space left"))


def test_a_rank_whose_connection_closes_is_gone(call: Call) -> None:
    call.members[1]._socket.shutdown(socket.SHUT_RDWR)
    heard = call.heard(3)  # the rank itself takes rank 0 for gone
    assert heard == {0: Gone(1, HERE), 2: Gone(1, HERE), 1: Gone(0, "127.0.0.1")}


def test_rank_0_is_missed_too(call: Call) -> None:
    call.hub.leave("ValueError: bad")
    assert call.heard(2) == dict.fromkeys((1, 2), Gone(0, HERE, "ValueError: bad"))
    assert call.all_ended()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_ranks_that_leave_in_order_are_not_missed(call: Call, order: tuple[int, ...]) -> None:
    for rank in order:
        (call.hub if rank == 0 else call.members[rank]).leave()
    assert call.all_ended()
    assert call.news.empty()


def test_a_stranger_is_sent_away(call: Call) -> None:
    for sent in (b'{"token": "guessed", "rank": 1, "host": "elsewhere"}\n', b"GET / HTTP/1.0\r\n\r\n", b"[1]\n" * 9):
        with socket.create_connection(("127.0.0.1", call.hub.port), timeout=20) as stranger:
            stranger.sendall(sent)
            assert stranger.recv(1) == b""
    call.members[1].leave("done for")
    assert call.heard(2) == dict.fromkeys((0, 2), Gone(1, HERE, "done for"))
