"""A whole step whose student is four numbers: what each token learns can be worked out on paper.

Two prompts with two completions over the letters a and b:

| rollout | group | text | reward | Â (no std) |
|---|---|---|---|---|
| 0 | A | ab | 2, correct | 1 |
| 1 | A | a | 0, wrong | −1 |
| 2 | B | b | 0, wrong | 0 |
| 3 | B | ba | 0, wrong | 0 |

log π_θ is −1 for a and −2 for b, log π_T −1.5 and −1: d = log π_T − log π_θ is −½ for a and +1 for b. Six tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillkit.backends import ReduceOp, StepBackend
from distillkit.betas.constant import Constant
from distillkit.components import RewardFn, RolloutSampler, TeacherScorer
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.step import DistillationStep
from distillkit.types import (
    RewardOutput,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    ScoreRequest,
    StepOutput,
    StudentScores,
    TeacherScores,
    TokenScores,
)
from tests import toy

A, B = toy.VOCABULARY.index("0"), toy.VOCABULARY.index("1")  # the letters a and b
TEXTS = ((A, B), (A,)), ((B,), (B, A))
TOKENS = 6

STUDENT = torch.zeros(len(toy.VOCABULARY))
TEACHER = torch.zeros(len(toy.VOCABULARY))
STUDENT[A], STUDENT[B] = -1.0, -2.0
TEACHER[A], TEACHER[B] = -1.5, -1.0


class Fixed(RolloutSampler):
    """Says the completions of the table."""

    same_engine = True

    def sync(self, student: StudentScorer) -> None:
        pass

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        for request, texts in zip(requests, TEXTS, strict=True):
            yield RolloutGroup(request=request, rollouts=tuple(self._rollout(ids) for ids in texts))

    def _rollout(self, ids: Sequence[int]) -> Rollout:
        return Rollout(
            completion_ids=torch.tensor(ids),
            behaviour_logprobs=torch.full((len(ids),), float("nan")),
            loss_mask=torch.ones(len(ids), dtype=torch.bool),
            policy_version=torch.zeros(len(ids), dtype=torch.long),
            finish_reason="stop",
            text="".join("a" if i == A else "b" for i in ids),
        )


class Correctness(RewardFn):
    """2 for a correct rollout, 0 for a wrong one; `None` is unknown and cannot be scored."""

    def __init__(self, *, correct: Sequence[bool | None] = (True, False, False, False)) -> None:
        super().__init__()
        self.correct = tuple(correct)

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        values = [None if c is None else 2.0 * c for c in self.correct]
        status = ["timed_out" if c is None else "scored" for c in self.correct]
        return RewardOutput.single("right", values, correct=self.correct, status=status)  # type: ignore[arg-type]


class TableTeacher(TeacherScorer):
    """The same log-prob for a letter wherever it stands; nothing at tokens of `blind` rollouts."""

    def __init__(self, *, table: Tensor = TEACHER, blind: Sequence[int] = ()) -> None:
        self.table = table
        self.blind = tuple(blind)

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True)

    def identity(self) -> str:
        return "table"

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        seen = torch.tensor([i not in self.blind for i in range(len(rollouts))])
        return TeacherScores(
            valid=rollouts.loss_mask & seen[:, None],
            sampled=self.table[rollouts.tokens].masked_fill(~rollouts.loss_mask, 0.0),
        )


class TableBackend(StepBackend):
    """Scores with a table, and keeps the gradient of every log-prob instead of stepping.

    `moved`: nats by which an update moves every log-prob of the letter a, so that later inner epochs are off-policy.
    """

    def __init__(self, moved: float = 0.0) -> None:
        self.table = STUDENT.clone()
        self.moved = moved
        self.seen: list[tuple[RolloutBatch, Tensor]] = []
        self.updates: list[dict[str, list[float]]] = []

    def score(
        self, batch: RolloutBatch, plan: ScorePlan, teacher: TeacherScores | None, reference: TeacherScores | None
    ) -> StudentScores:
        mask = batch.loss_mask
        leaf = self.table[batch.tokens].masked_fill(~mask, 0.0).requires_grad_()
        if torch.is_grad_enabled():
            self.seen.append((batch, leaf))
        divergence = None
        if plan.divergence is not None:
            assert teacher is not None and teacher.sampled is not None
            value = plan.divergence(TokenScores(sampled=leaf[mask]), TokenScores(sampled=teacher.sampled[mask]))
            divergence = torch.zeros(mask.shape).masked_scatter(mask, value) * teacher.valid
        return StudentScores(loss_mask=mask, logprobs=leaf, distil_logprobs=leaf, divergence=divergence)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def whole(self) -> AbstractContextManager[StudentScorer]:
        return nullcontext(toy.scorer())

    def zero_grad(self) -> None:
        self.seen = []

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        return torch.zeros(())

    def optimizer_step(self) -> None:
        found: dict[str, list[float]] = {}
        for batch, leaf in self.seen:
            assert leaf.grad is not None
            for i, text in enumerate(batch.texts):
                assert bool((leaf.grad[i][~batch.loss_mask[i]] == 0).all())
                found[text] = leaf.grad[i][batch.loss_mask[i]].tolist()
        self.updates.append(found)
        self.table[A] += self.moved

    def all_reduce(self, values: Tensor, op: ReduceOp) -> Tensor:
        return values


def run(
    *,
    settings: StepSettings | None = None,
    step: int = 0,
    moved: float = 0.0,
    correct: Sequence[bool | None] = (True, False, False, False),
    blind: Sequence[int] = (),
    rewards: bool = True,
    **slots: Any,
) -> tuple[list[dict[str, list[float]]], StepOutput]:
    """Run the step; return ∂loss/∂log π_θ of every token by rollout text, for each update, and the step's output."""
    parts = StepParts(
        sampler=Fixed(group_size=2, max_new_tokens=4),
        teacher=TableTeacher(blind=blind),
        rewards=(Correctness(correct=correct),) if rewards else (),
        beta=None if slots.get("divergence") is None else Constant(value=0.2),
    )
    whole = DistillationStep(replace(parts, **slots), settings or StepSettings(), toy.scorer(), toy.info())
    backend = TableBackend(moved)
    output = whole.run(toy.requests([[2, 3], [4]], group_size=2, max_new_tokens=4), step=step, backend=backend)
    return backend.updates, output


def advantages(found: dict[str, list[float]]) -> list[list[float]]:
    """−∂loss/∂log π_θ times the number of tokens: on-policy with a token mean, the token's advantage; 0 if skipped."""
    lengths = {"ab": 2, "a": 1, "b": 1, "ba": 2}
    return [[-TOKENS * g for g in found.get(text, [0.0] * n)] for text, n in lengths.items()]
