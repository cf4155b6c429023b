"""Whether two steps agree: the base class, and the judges that need no model."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from distillkit.errors import ConfigError, problem

__all__ = ["ExactJudge", "OverlapJudge", "StepJudge", "StepPair", "normal_text", "token_overlap"]

Part = Literal["meta", "question", "answer"]

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s.,;:!?…'\"`()\[\]{}。、，]")
"""A number, a word, or a sign that is no punctuation, such as an operator."""


@dataclass(frozen=True, kw_only=True)
class StepPair:
    """One part of a student's step beside the same part of the teacher's, and the problem both work on."""

    kind: Part
    ours: str
    theirs: str
    problem: str


class StepJudge(ABC):
    """Decides whether two steps agree: turn to the same sub-problem, ask the same, answer the same."""

    short_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "exact": "distillkit.rewards.gsrm.judge.ExactJudge",
            "overlap": "distillkit.rewards.gsrm.judge.OverlapJudge",
            "local_lm": "distillkit.rewards.gsrm.local_judge.LocalJudge",
            "server_lm": "distillkit.rewards.gsrm.server_judge.ServerJudge",
        }
    )
    """What a config may call the ready-made ones."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - some have nothing to set up
        """Load models, open connections. Called once before `agree`."""

    def probe(self) -> None:  # noqa: B027 - nor to ask
        """Raise `ConfigError` where settings keep a server from being used. Called by a reward after `setup`."""

    def teardown(self) -> None:  # noqa: B027 - nor to free
        """Free what `setup` took."""

    @abstractmethod
    def agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        """Return one verdict per pair, in order; None where the judge gave neither yes nor no."""


class ExactJudge(StepJudge):
    """Two texts agree when they are equal in normal form; see `normal_text`.

    Right where decomposers write in a fixed manner, as the embedded one does. On free text it finds too few matches.
    """

    def agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        return [normal_text(pair.ours) == normal_text(pair.theirs) for pair in pairs]


class OverlapJudge(StepJudge):
    """Two texts agree when the words, numbers and operators that they share are enough; see `token_overlap`.

    Blind to order and negation. A text without any such token is compared as `ExactJudge` does.

    Args:
        threshold: least F1, above 0 and at most 1.

    Raises:
        ConfigError: the threshold is out of range.
    """

    def __init__(self, *, threshold: float = 0.6) -> None:
        if not 0 < threshold <= 1:
            where = "model.rewards: gsrm.judge.threshold"
            raise ConfigError(problem(where, got=threshold, expected="above 0 and at most 1"))
        self.threshold = threshold

    def agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        return [token_overlap(pair.ours, pair.theirs) >= self.threshold for pair in pairs]


def normal_text(text: str) -> str:
    """Return a text in the form in which steps are compared.

    Unicode composed (NFC: x² stays another thing than x2), minus signs made hyphens, case folded, white space made
    single spaces, full stops, commas, colons, semicolons and question marks taken off the end (an exclamation mark
    stays: it may be a factorial).

    Example:
        >>> normal_text("  Sum  the PARTS. "), normal_text("5!"), normal_text("x = −2")
        ('sum the parts', '5!', 'x = -2')
    """
    folded = unicodedata.normalize("NFC", text).replace("−", "-").casefold()
    return " ".join(folded.split()).rstrip(".,:;?…。 ")


def token_overlap(one: str, other: str) -> float:
    """Return the F1 of two texts as bags of tokens: 2·|shared| / (|one| + |other|), in [0, 1].

    Tokens are words, numbers and signs that are no punctuation, in `normal_text`. Where neither has any, 1 for equal
    texts and 0 for others.

    Example:
        >>> token_overlap("multiply 4*2", "Multiply 4 * 3")
        0.75
    """
    ours, theirs = normal_text(one), normal_text(other)
    bags = [Counter(_TOKEN.findall(text)) for text in (ours, theirs)]
    total = bags[0].total() + bags[1].total()
    return 2 * (bags[0] & bags[1]).total() / total if total else float(ours == theirs)
