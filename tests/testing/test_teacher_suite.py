"""The teacher suite must fail teachers broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.components import TeacherScorer
from distillkit.testing import ConformanceError, FakeTeacher, check, encode, tiny_model
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores
from tests.testing.broken import finds


class Live(TeacherScorer):
    """A random model, scored the plain way; the broken ones vary what it does."""

    def __init__(self) -> None:
        self._model = tiny_model(7)

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True)

    def identity(self) -> str:
        return "live"

    def logprobs(self, tokens: Tensor) -> Tensor:
        """[N, L, V]: entry t predicts the token at t."""
        with torch.no_grad():
            logits = self._model(input_ids=tokens).logits.float().log_softmax(-1)
        return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], dim=1)

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        own = self.logprobs(rollouts.tokens).gather(-1, rollouts.tokens.unsqueeze(-1)).squeeze(-1)
        return TeacherScores(valid=rollouts.loss_mask, sampled=own.masked_fill(~rollouts.loss_mask, 0.0))


class ShiftedForward(Live):
    """Puts the score of token t at t - 1."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(replace(rollouts, loss_mask=rollouts.attention_mask), request)
        assert scores.sampled is not None
        return TeacherScores(valid=rollouts.loss_mask, sampled=scores.sampled.roll(-1, dims=1))


class ShiftedBack(Live):
    """Puts the score of token t at t + 1."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(replace(rollouts, loss_mask=rollouts.attention_mask), request)
        assert scores.sampled is not None
        return TeacherScores(valid=rollouts.loss_mask, sampled=scores.sampled.roll(1, dims=1))


class PadsLeft(Live):
    """Lets padding take part: what attending to the batch's length does."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=scores.sampled - 0.01 * rollouts.tokens.shape[1])


class ByRow(Live):
    """Scores later rows lower."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=scores.sampled - torch.arange(len(rollouts)).unsqueeze(1))


class Dropout(Live):
    """Left in training mode."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=scores.sampled - torch.rand(scores.sampled.shape))


class WithGradient(Live):
    """Forgets that it is frozen."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=scores.sampled.requires_grad_())


class InferenceTensors(Live):
    """Hands out tensors that cannot enter autograd."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        with torch.inference_mode():
            return super().score(rollouts, request)


class ScoresPrompts(Live):
    """Calls prompt positions valid."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        return replace(super().score(rollouts, request), valid=rollouts.attention_mask)


class Probabilities(Live):
    """Gives -log p."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=-scores.sampled)


class Edits(Live):
    """Cleans up after the student."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        rollouts.tokens.masked_fill_(~rollouts.attention_mask, 5)
        return super().score(rollouts, request)


class Restless(Live):
    """Another identity each time."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def identity(self) -> str:
        self._calls += 1
        return f"live {self._calls}"


LIKES_DIGITS = tuple(float(i) * (i in encode("0123456789")) for i in range(99))


class Vary(FakeTeacher):
    """FakeTeacher whose scores the broken ones vary.

    Args:
        none: nothing.
    """

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        return self.change(super().score(rollouts, request))

    def change(self, scores: TeacherScores) -> TeacherScores:
        return scores


class OfAnotherToken(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return scores if scores.topk is None else replace(scores, topk=scores.topk.roll(1, dims=-1))


class RepeatsIds(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return (
            scores
            if scores.topk_ids is None
            else replace(scores, topk_ids=scores.topk_ids[..., :1].expand_as(scores.topk_ids))
        )


class LogitsAsLogprobs(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return scores if scores.topk is None else replace(scores, topk=scores.topk + 5.0)


class ForgetsEntropy(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return replace(scores, entropy=None)


class KeepsHidden(Vary):
    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        return super().score(rollouts, replace(request, full=True))


class AnotherHead(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return scores if scores.head is None else replace(scores, head=lambda h: h * torch.arange(99.0))


class StatesOfAllTokens(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return (
            scores if scores.hidden is None else replace(scores, hidden=tuple(torch.ones(9, 1) for _ in scores.hidden))
        )


class NothingValid(Vary):
    def change(self, scores: TeacherScores) -> TeacherScores:
        return replace(scores, valid=torch.zeros_like(scores.valid))


class OffersNothing(Vary):
    offers = ScoreRequest()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (ShiftedForward(), "a score depends on later tokens: shifted by one?"),
        (ShiftedBack(), "the score at a position does not depend on the token there: shifted by one?"),
        (PadsLeft(), "a score depends on the padding"),
        (ByRow(), "a score depends on the place of the rollout in the batch"),
        (Dropout(), "scores change from call to call"),
        (WithGradient(), "scores carry gradient"),
        (InferenceTensors(), "scores are inference tensors"),
        (ScoresPrompts(), "valid reaches beyond loss_mask"),
        (Probabilities(), "a log-prob is above 0"),
        (Edits(), "edits its input RolloutBatch.tokens in place"),
        (Restless(), "identity changes between calls"),
        (OfAnotherToken(logits=LIKES_DIGITS), "topk and sampled differ at the same token"),
        (RepeatsIds(), "topk_ids repeat at a position"),
        (LogitsAsLogprobs(), "topk log-probs add up to more than 1"),
        (ForgetsEntropy(), "entropy was asked for and is missing"),
        (KeepsHidden(), "hidden states were not asked for and are kept"),
        (AnotherHead(), "head(hidden) and sampled differ at the same token"),
        (StatesOfAllTokens(), "hidden has [9, 9"),
        (NothingValid(), "no position is valid"),
        (OffersNothing(), "offers nothing"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, TeacherScorer) else "",
)
def test_broken_teachers_are_found(part: TeacherScorer, text: str) -> None:
    finds(part, text)


@pytest.mark.parametrize(
    "part",
    [Live(), FakeTeacher(logits=(0.0, 3.0, 1.0)), FakeTeacher(blind_to="15")],
    ids=["live", "offers logits", "blind"],
)
def test_sound_teachers_pass(part: TeacherScorer) -> None:
    check(part)


def test_a_recording_is_not_asked_for_other_tokens() -> None:
    class Recorded(Live):
        """Knows what it was recorded on, and refuses the rest."""

        def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
            if not hasattr(self, "_known"):
                self._known: set[Any] = {self._key(rollouts, i) for i in range(len(rollouts))}
            if any(self._key(rollouts, i) not in self._known for i in range(len(rollouts))):
                raise KeyError("not recorded")
            return super().score(rollouts, request)

        def _key(self, rollouts: RolloutBatch, i: int) -> tuple[int, ...]:
            return tuple(rollouts.completion_ids(i).tolist())

    check(Recorded(), any_tokens=False)
    with pytest.raises(ConformanceError, match="not recorded"):
        check(Recorded())
