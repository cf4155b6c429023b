"""What takes traces apart: the base class, and how a model's reply becomes a decomposition."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch

from distillkit.decomposition import Decomposition, DecompositionError, instructions, parse

__all__ = ["Decomposer", "Item", "Undecided", "grammar_digest", "read_reply", "without_thinking"]

Item = tuple[str, str]
"""A problem and a trace that works on it."""


@dataclass(frozen=True, kw_only=True)
class Undecided:
    """No decomposition: the kind of reason, what else is known, and whether asking again would give the same.

    `status` is that of a server's HTTP answer, where one was the reason.
    """

    reason: str
    detail: str = ""
    lasting: bool = True
    status: int | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Decomposer(ABC):
    """Takes reasoning traces apart into steps."""

    short_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "local": "distillkit.rewards.gsrm.local.LocalDecomposer",
            "server": "distillkit.rewards.gsrm.server.ServerDecomposer",
        }
    )
    """What a config may call the ready-made ones."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - some have nothing to set up
        """Load models, open connections. Called once before `decompose`."""

    def probe(self) -> None:  # noqa: B027 - nor to ask
        """Raise `ConfigError` where settings keep a server from being used. Called by a reward after `setup`."""

    def teardown(self) -> None:  # noqa: B027 - nor to free
        """Free what `setup` took."""

    @abstractmethod
    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        """Return one result per (problem, trace), in order; a trace that cannot be taken apart raises nothing."""

    @abstractmethod
    def identity(self) -> str:
        """Return what results depend on beside the item: part of cache keys. Without addresses and keys."""


def grammar_digest() -> str:
    """Return a digest of the grammar: another grammar is another decomposer."""
    return hashlib.sha256(instructions().encode()).hexdigest()[:16]


def without_thinking(reply: str) -> str:
    """Return a reply without the thoughts that a thinking model puts before it.

    Example:
        >>> without_thinking("<think>hm, no</think> yes")
        'yes'
    """
    text = reply.strip()
    return text.partition("</think>")[2].strip() if text.startswith("<think>") else text


def read_reply(reply: str, *, finished: bool, limit: int) -> Decomposition | Undecided:
    """Return the decomposition that a model's reply spells.

    Args:
        reply: what the model wrote.
        finished: whether it ended by itself. A reply that was cut is not read: its last value may be cut as well.
        limit: `max_new_tokens`, for the reason.

    Example:
        >>> read_reply("Step 1: divide", finished=True, limit=9)
        Undecided(reason='not a decomposition', detail='text outside a block', lasting=True)
    """
    if not finished:
        return Undecided(reason="a decomposition longer than max_new_tokens", detail=str(limit))
    try:
        return parse(without_thinking(reply))
    except DecompositionError as error:
        what = str(error).split("\n", 1)[0].removeprefix("decomposition: ")
        return Undecided(reason="not a decomposition", detail=what)
