"""TRRD through a whole step of a real (tiny) model: beside a KL to a reference, and at its GRPO end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distillkit.betas.constant import Constant
from distillkit.components import DivergenceEstimator
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.sampled import K2, K3
from distillkit.divergences.topk import TopK
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.trrd import TRRD
from tests import toy
from tests.test_scorer import full_logits, local_teacher
from tests.test_step import PROMPTS, EvenDigits, build, close, gradient


def per_token(name: str, student: Tensor, reference: Tensor, ids: Tensor) -> Tensor:
    """The divergence [M] from whole distributions, in one piece."""
    p, q = student.log_softmax(-1), reference.log_softmax(-1)
    ours, theirs = (side.gather(-1, ids[:, None])[:, 0] for side in (p, q))
    if name == "k2":
        return (ours - theirs) ** 2 / 2
    if name == "k3":
        return (theirs - ours).exp() - (theirs - ours) - 1
    if name == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    best = q.topk(3, dim=-1).indices
    p, q = p.gather(-1, best).exp(), q.gather(-1, best).exp()
    rest = (1 - p.sum(-1)) * ((1 - p.sum(-1)) / (1 - q.sum(-1))).log()
    return (p * (p / q).log()).sum(-1) + rest


@pytest.mark.parametrize(
    ("name", "part"), [("k2", K2()), ("k3", K3()), ("topk", TopK(k=3)), ("reverse_kl", ReverseKL())]
)
def test_a_kl_to_a_reference_adds_its_own_gradient(name: str, part: DivergenceEstimator) -> None:
    """TRRD's mean per rollout, then over rollouts, counts for the reference's term too."""
    plain = gradient(build(objective=TRRD(), rewards=[EvenDigits()]))[0]
    both, _, output = gradient(
        build(
            objective=TRRD(),
            rewards=[EvenDigits()],
            reference=local_teacher(toy.model(2)),
            reference_divergence=part,
            reference_beta=Constant(value=0.7),
        )
    )
    batch, student = toy.batch(PROMPTS), toy.model(0)
    logits, reference = full_logits(student, batch), full_logits(toy.model(2), batch).detach()
    values = per_token(name, logits, reference, batch.tokens[batch.loss_mask])
    means = [row.mean() for row in values.split(batch.loss_mask.sum(1).tolist())]
    (0.7 * torch.stack(means).mean()).backward()
    close(both - plain, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]), 1e-4)
    assert output.metrics["train/reference_divergence"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert output.metrics["train/reference_beta"] == 0.7
    assert {"train/teacher_clamped", "train/clipped_high", "train/clipped_low"} <= set(output.metrics)


def test_alpha_one_is_grpo_bit_for_bit() -> None:
    settings = {"std": True, "correction": 0, "eps": 0.0, "aggregation": "sequence", "clip_high": 0.28}
    ours = gradient(build(objective=TRRD(alpha=1.0), rewards=[EvenDigits()]))[0]
    theirs = gradient(build(objective=GRPO(**settings), rewards=[EvenDigits()]))[0]  # type: ignore[arg-type]
    assert torch.equal(ours, theirs)
    other = gradient(build(objective=TRRD(alpha=0.5), rewards=[EvenDigits()]))[0]
    assert (other - ours).norm() / ours.norm() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_teacher_equal_to_the_old_policy_is_grpo(alpha: float) -> None:
    twin = local_teacher(toy.model(0))
    ours = gradient(build(objective=TRRD(alpha=alpha), rewards=[EvenDigits()], teacher=twin))[0]
    close(ours, gradient(build(objective=TRRD(alpha=1.0), rewards=[EvenDigits()]))[0])
