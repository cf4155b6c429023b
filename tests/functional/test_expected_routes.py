"""Joint loss, advantage and shaped reward: three gradients of one divergence, summed over everything a policy can say.

Pairs of completions stand for a group of two, so the group's mean is subtracted as in training (without the std).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillkit.functional.advantages import group_advantages
from distillkit.functional.divergences import k1, k2
from distillkit.functional.objectives import clipped_policy_loss
from tests.functional.test_expected_gradients import kl_gradient, relative
from tests.functional.toy_policy import Prefix, ToyPolicy, prefixes, sequences

BETA = 0.3


def right(y: Prefix) -> float:
    return 2.0 * (y[-1] == 2)


def reward_gradient(student: ToyPolicy) -> Tensor:
    """∇E[R], from the probabilities themselves."""
    return student.gradient(torch.stack([student.of(y).sum().exp() * right(y) for y in sequences()]).sum())


def group_gradient(student: ToyPolicy, reward: Callable[[Prefix], float], extra: Callable[[Prefix], Tensor]) -> Tensor:
    """Expected gradient of Σ_t [policy loss + extra], rollouts in groups of two, baseline included.

    E over pairs of (R_i − mean)·∇log π is (1 − ½)·∇E[R], so the advantages are doubled to compare.
    """
    everything = list(sequences())
    rewards = torch.tensor([reward(y) for y in everything], dtype=torch.float64)
    probability = torch.stack([student.probability(y) for y in everything])
    total = torch.zeros(())
    for i, y in enumerate(everything):
        # Â of y averaged over its partner, by the function that training uses.
        pairs = torch.stack([rewards[i].expand(len(everything)), rewards], dim=1).flatten()
        groups = torch.arange(len(everything)).repeat_interleave(2)
        advantages = group_advantages(pairs, groups, std=False).double()[0::2]
        mean = 2 * (probability * advantages).sum()
        logprobs = student.of(y)
        policy = clipped_policy_loss(logprobs - logprobs.detach(), mean.expand(len(y)), 0.2, 0.2)
        total = total + probability[i] * (policy.sum() + extra(y).sum())
    return student.gradient(total)


@pytest.fixture
def prefix_term(student: ToyPolicy, teacher: ToyPolicy) -> Tensor:
    """Σ_prefix ∇P(prefix)·KL(prefix): what a choice of token does to the divergence of later tokens."""
    total = torch.zeros(())
    for prefix in prefixes():
        if prefix:
            p, q = student.logprobs(prefix).detach(), teacher.logprobs(prefix)
            total = total + student.of(prefix).sum().exp() * (p.exp() * (p - q)).sum().detach()
    return student.gradient(total)


def nothing(y: Prefix) -> Tensor:
    return torch.zeros(1)


def test_joint_loss_and_advantage_have_the_kls_gradient_per_prefix(student: ToyPolicy, teacher: ToyPolicy) -> None:
    want = -reward_gradient(student) + BETA * kl_gradient(student, teacher, "reverse")
    joint = group_gradient(student, right, lambda y: BETA * k2(student.of(y), teacher.of(y)))

    def pull(y: Prefix) -> Tensor:
        logprobs = student.of(y)
        d = -k1(logprobs, teacher.of(y)).detach()
        return clipped_policy_loss(logprobs - logprobs.detach(), BETA * d, 0.2, 0.2)

    assert relative(joint, want) < 1e-6
    assert relative(group_gradient(student, right, pull), want) < 1e-6


def test_a_summed_reward_has_the_whole_sequences_kl(
    student: ToyPolicy, teacher: ToyPolicy, prefix_term: Tensor
) -> None:
    """R − β·Σ_t k1: the joint loss's gradient *and* what a token does to the divergence of the later ones."""

    def gap(y: Prefix) -> Tensor:
        return k1(student.of(y), teacher.of(y)).detach()

    got = group_gradient(student, lambda y: right(y) - BETA * gap(y).sum().item(), nothing)
    gaps = [student.of(y).sum() - teacher.of(y).sum() for y in sequences()]
    whole = torch.stack([student.of(y).sum().exp() * g for y, g in zip(sequences(), gaps, strict=True)]).sum()
    assert relative(got, -reward_gradient(student) + BETA * student.gradient(whole)) < 1e-6
    joint = -reward_gradient(student) + BETA * kl_gradient(student, teacher, "reverse")
    assert relative(got, joint + BETA * prefix_term) < 1e-6
    assert relative(got, joint) > 0.02  # the routes do differ


def test_a_mean_reward_divides_every_rollouts_divergence_by_its_length(student: ToyPolicy, teacher: ToyPolicy) -> None:
    """R − β·mean_t k1: Σ_y ∇π(y)·mean gap(y), which is no KL's gradient (1/|y| is weighed too)."""

    def gap(y: Prefix) -> Tensor:
        return k1(student.of(y), teacher.of(y)).detach()

    got = group_gradient(student, lambda y: right(y) - BETA * gap(y).mean().item(), nothing)
    means = [(student.of(y) - teacher.of(y)).mean().detach() for y in sequences()]
    exact = torch.stack([student.of(y).sum().exp() * m for y, m in zip(sequences(), means, strict=True)]).sum()
    assert relative(got, -reward_gradient(student) + BETA * student.gradient(exact)) < 1e-6
    summed = group_gradient(student, lambda y: right(y) - BETA * gap(y).sum().item(), nothing)
    assert relative(got, summed) > 0.02
