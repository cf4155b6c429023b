"""Conformance of the parts that see single numbers or token positions: divergence and beta."""

from __future__ import annotations

import copy
import json
import math
from typing import get_args

import torch
from torch import Tensor

from distillkit.components import BetaScheduler, DistillThrough, DivergenceEstimator
from distillkit.testing.constructor import check_common
from distillkit.testing.findings import Findings, close, tensors
from distillkit.types import ScoreRequest, TokenScores

__all__ = ["check_beta", "check_divergence"]

_POSITIONS = 7


def check_divergence(part: DivergenceEstimator) -> None:
    """Check a divergence: shapes, gradients to the student alone, independent positions, finite at extremes.

    Raises:
        ConformanceError: with every broken rule.
    """
    findings = Findings(part)
    check_common(findings, part)
    sound = len(findings.failures)
    with findings.rule("needs"):
        findings.expect(isinstance(part.needs, ScoreRequest) and bool(part.needs), "needs asks for no scores")
    if len(findings.failures) > sound:
        findings.finish()
    _through(findings, part)
    with findings.rule("cannot be called with the scores it needs"):
        _values(findings, part)
        _gradients(findings, part)
        _positions(findings, part)
    with findings.rule("a chunk without positions"):
        value = part(*_scores(part.needs, 0))
        findings.expect(value.shape == (0,), f"a chunk without positions: shape {tuple(value.shape)}, not (0,)")
    with findings.rule("extreme scores"):
        _extremes(findings, part)
    findings.finish()


def _through(findings: Findings, part: DivergenceEstimator) -> None:
    allowed, known = part.allowed_through, get_args(DistillThrough)
    findings.expect(allowed and set(allowed) <= set(known), f"allowed_through must name some of {', '.join(known)}")
    if set(allowed) != set(known):
        findings.expect(part.why_not.strip(), "why_not does not say why the other ways are refused")
    if "advantage" in allowed:
        text = "allows itself as an advantage without seeing the sampled token: its expected gradient is zero"
        findings.expect(part.needs.sampled, text)


def _values(findings: Findings, part: DivergenceEstimator) -> None:
    student, teacher = _scores(part.needs, _POSITIONS)
    with findings.untouched(student, teacher):
        value = part(student, teacher)
    if findings.expect(isinstance(value, Tensor) and value.shape == (_POSITIONS,), f"returns {_shape(value)}, not [M]"):
        findings.expect(value.dtype == torch.float32, f"returns {value.dtype} for float32 scores, not float32")
        findings.expect(value.isfinite().all(), "returns values that are not finite")
        findings.expect(close(part(student, teacher), value), "gives other values when called again")
    _, same = _scores(part.needs, _POSITIONS)
    zero = part(same, same)
    findings.expect(close(zero, torch.zeros(_POSITIONS), 1e-5), "is not 0 where student and teacher are equal")


def _gradients(findings: Findings, part: DivergenceEstimator) -> None:
    student, teacher = _scores(part.needs, _POSITIONS)
    ours, theirs = ([t.requires_grad_() for _, t in tensors(side)] for side in (student, teacher))
    value = part(student, teacher)
    if not findings.expect(value.requires_grad, "no gradient reaches the student"):
        return
    reached = torch.autograd.grad(value.sum(), [*ours, *theirs], allow_unused=True)
    for gradient in reached[: len(ours)]:
        arrived = gradient is not None and bool((gradient != 0).any())
        if findings.expect(arrived, "no gradient reaches the student") and gradient is not None:
            findings.expect(gradient.isfinite().all(), "the student's gradient is not finite")
    for gradient in reached[len(ours) :]:
        findings.expect(gradient is None or bool((gradient == 0).all()), "gradient flows into the teacher's scores")


def _positions(findings: Findings, part: DivergenceEstimator) -> None:
    student, teacher = _scores(part.needs, _POSITIONS)
    value = part(student, teacher)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    moved = part(*(_take(side, order) for side in (student, teacher)))
    findings.expect(close(moved, value[order]), "a value depends on the order of the positions")
    ones = [torch.tensor([i]) for i in range(_POSITIONS)]
    alone = torch.cat([part(_take(student, one), _take(teacher, one)) for one in ones])
    findings.expect(close(alone, value), "a value depends on which other positions are in the chunk")


def _extremes(findings: Findings, part: DivergenceEstimator) -> None:
    for flip in (False, True):
        student, teacher = _scores(part.needs, _POSITIONS, extreme=True, flip=flip)
        ours = [t.requires_grad_() for _, t in tensors(student)]
        value = part(student, teacher)
        findings.expect(value.isfinite().all(), "a value is not finite at extreme scores")
        if value.requires_grad:
            for gradient in torch.autograd.grad(value.sum(), ours, allow_unused=True):
                text = "a gradient is not finite at extreme scores"
                findings.expect(gradient is None or gradient.isfinite().all(), text)


def _scores(
    needs: ScoreRequest, positions: int, *, extreme: bool = False, flip: bool = False
) -> tuple[TokenScores, TokenScores]:
    """Both sides' scores of `positions` tokens: what `needs` asks for, and nothing else."""
    generator = torch.Generator().manual_seed(positions)
    k = max(needs.topk, needs.student_topk)
    vocabulary = max(11, k + 5)
    sides = [2 * torch.randn(positions, vocabulary, generator=generator) for _ in range(2)]
    if extreme:
        sides[0][:, 0], sides[0][:, 1], sides[1][:, 0], sides[1][:, 1] = 1e4, -1e4, -1e4, 1e4
        sides = sides[::-1] if flip else sides
    logprobs = [side.log_softmax(-1) for side in sides]
    # Tokens are the student's own: even the unlikeliest that it draws is no less likely than about e^-20.
    token = torch.randint(vocabulary, (positions, 1), generator=generator)
    sampled = [logprobs[0].gather(-1, token).clamp(min=-20.0), logprobs[1].gather(-1, token)]
    chosen = logprobs[0 if needs.student_topk else 1].topk(k, dim=-1).indices
    student, teacher = (
        TokenScores(
            sampled=sampled[i].squeeze(1) if needs.sampled else None,
            topk=logprobs[i].gather(-1, chosen) if k else None,
            logits=sides[i] if needs.full else None,
        )
        for i in range(2)
    )
    return student, teacher


def _take(scores: TokenScores, index: Tensor) -> TokenScores:
    return TokenScores(**{name.split(".")[1]: tensor[index] for name, tensor in tensors(scores)})


def _shape(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_beta(part: BetaScheduler) -> None:
    """Check a schedule: finite numbers, inputs left alone, and a state that a resumed run continues from exactly.

    Raises:
        ConformanceError: with every broken rule.
    """
    findings = Findings(part)
    check_common(findings, part)
    with findings.rule("value"):
        for step in (0, 1, 2, 99, 100, 10_000):
            signals = _signals(step)
            value = copy.deepcopy(part).value(step, signals)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if findings.expect(number, f"value({step}, ...) is {type(value).__name__}, not a number"):
                findings.expect(math.isfinite(value), f"value({step}, ...) is {value}")
            findings.expect(signals == _signals(step), "value() changes the signals it is given")
        findings.expect(
            isinstance(copy.deepcopy(part).value(0, {}), int | float), "value(0, {}) fails: step 0 has no signals"
        )
    with findings.rule("state"):
        _state(findings, part)
    findings.finish()


def _signals(step: int) -> dict[str, float]:
    return {"train/divergence": 0.1 + 0.3 * (step % 5), "train/reward": 0.5, "train/reverse_kl_to_old": 0.01 * step}


def _state(findings: Findings, part: BetaScheduler) -> None:
    whole, first = copy.deepcopy(part), copy.deepcopy(part)
    values = [whole.value(step, _signals(step)) for step in range(12)]
    for step in range(6):
        first.value(step, _signals(step))
    try:
        state = json.loads(json.dumps(first.state_dict()))
    except TypeError as error:
        findings.expect(False, f"state_dict is not plain numbers, strings and lists: {error}")
        return
    resumed = copy.deepcopy(part)
    resumed.load_state_dict(state)
    continued = [resumed.value(step, _signals(step)) for step in range(6, 12)]
    text = "a resumed schedule goes on differently: state_dict does not hold all state"
    findings.expect(continued == values[6:], text)
