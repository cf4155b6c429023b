"""The divergence and beta suites must fail parts broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from distillkit.components import BetaScheduler, DistillThrough, DivergenceEstimator
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.sampled import K1, K2
from distillkit.divergences.topk import TopK
from distillkit.testing import ConformanceError, FakeTeacher, check, check_divergence
from distillkit.types import ScoreRequest, TokenScores
from tests.testing.broken import finds


def gap(student: TokenScores, teacher: TokenScores) -> Tensor:
    assert student.sampled is not None and teacher.sampled is not None
    return student.sampled - teacher.sampled


class WrongShape(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        return super().__call__(student, teacher).sum()


class KeepsVocabulary(ReverseKL):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        assert student.logits is not None and teacher.logits is not None
        return student.logits.softmax(-1) - teacher.logits.detach().softmax(-1)


class Detached(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        return super().__call__(student, teacher).detach()


class NoGradientButAGraph(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        value = super().__call__(student, teacher)
        return value.detach() + 0.0 * value


class IntoTeacher(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        return 0.5 * gap(student, teacher).square()


class EditsInputs(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        assert teacher.sampled is not None
        with torch.no_grad():
            teacher.sampled.clamp_(min=-0.5)
        return super().__call__(student, teacher)


class ByPosition(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        value = super().__call__(student, teacher)
        return value * torch.arange(1, len(value) + 1)


class Whitened(K1):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        value = super().__call__(student, teacher)
        return value - value.mean()


class Wide(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        return super().__call__(student, teacher).double()


class NotZero(K2):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        return super().__call__(student, teacher) + 1.0


class NaiveSoftmax(ReverseKL):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        assert student.logits is not None and teacher.logits is not None
        p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (student.logits, teacher.logits.detach()))
        return (p * (p / q).log()).sum(-1)


class FiniteValueNanGradient(ReverseKL):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        assert student.logits is not None and teacher.logits is not None
        p, q = student.logits.softmax(-1), teacher.logits.detach().softmax(-1)
        return torch.where(p > 0, p * (p.log() - q.clamp(min=1e-30).log()), 0.0).sum(-1)


class Stateful(K2):
    calls = 0

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        self.calls += 1
        return super().__call__(student, teacher) * self.calls


class NeedsNothing(K2):
    needs = ScoreRequest()  # type: ignore[assignment]


class NeedsLess(K2):
    needs = ScoreRequest(topk=3)  # type: ignore[assignment]


class BlindAdvantage(TopK):
    allowed_through: ClassVar[tuple[DistillThrough, ...]] = ("loss", "advantage", "reward")


class NoReason(K2):
    why_not = ""


class NowhereAllowed(K2):
    allowed_through = ()


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (WrongShape(), "returns shape [], not [M]"),
        (KeepsVocabulary(), "returns shape [7, 11], not [M]"),
        (Detached(), "no gradient reaches the student"),
        (NoGradientButAGraph(), "no gradient reaches the student"),
        (IntoTeacher(), "gradient flows into the teacher's scores"),
        (EditsInputs(), "edits its input TokenScores.sampled in place"),
        (ByPosition(), "a value depends on the order of the positions"),
        (Whitened(), "a value depends on which other positions are in the chunk"),
        (Wide(), "returns torch.float64 for float32 scores"),
        (NotZero(), "is not 0 where student and teacher are equal"),
        (NaiveSoftmax(), "a value is not finite at extreme scores"),
        (FiniteValueNanGradient(), "a gradient is not finite at extreme scores"),
        (Stateful(), "gives other values when called again"),
        (NeedsNothing(), "needs asks for no scores"),
        (NeedsLess(), "cannot be called with the scores it needs: ContractError"),
        (BlindAdvantage(), "allows itself as an advantage without seeing the sampled token"),
        (NoReason(), "why_not does not say why"),
        (NowhereAllowed(), "allowed_through must name some of loss, advantage, reward"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, DivergenceEstimator) else "",
)
def test_broken_divergences_are_found(part: DivergenceEstimator, text: str) -> None:
    finds(part, text)


def test_the_suite_of_another_slot_does_not_pass_by_accident() -> None:
    with pytest.raises(ConformanceError, match="needs: AttributeError"):
        check_divergence(FakeTeacher())  # type: ignore[arg-type]


class Nan(BetaScheduler):
    """A number."""

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        return float("nan") if step == 100 else 1.0


class Text(BetaScheduler):
    """A number."""

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        return "0.1"  # type: ignore[return-value]


class EditsSignals(BetaScheduler):
    """A number."""

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        signals["seen"] = 1.0  # type: ignore[index]
        return 0.1


class WantsSignals(BetaScheduler):
    """A number."""

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        return signals["train/divergence"]


class Forgetful(BetaScheduler):
    """Follows the divergence, and forgets to say so."""

    def __init__(self) -> None:
        self._level = 0.1

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        self._level *= 1.1 if signals.get("train/divergence", 0.0) > 0.5 else 0.9
        return self._level


class Adaptive(Forgetful):
    """Follows the divergence."""

    def state_dict(self) -> dict[str, Any]:
        return {"level": self._level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._level = state["level"]


class Tensors(Adaptive):
    """Follows the divergence."""

    def state_dict(self) -> dict[str, Any]:
        return {"level": torch.tensor(self._level)}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (Nan(), "value(100, ...) is nan"),
        (Text(), "value(0, ...) is str, not a number"),
        (EditsSignals(), "value() changes the signals it is given"),
        (WantsSignals(), "value: KeyError"),
        (Forgetful(), "a resumed schedule goes on differently"),
        (Tensors(), "state_dict is not plain numbers, strings and lists"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BetaScheduler) else "",
)
def test_broken_schedules_are_found(part: BetaScheduler, text: str) -> None:
    finds(part, text)


def test_a_schedule_with_saved_state_passes() -> None:
    check(Adaptive())
