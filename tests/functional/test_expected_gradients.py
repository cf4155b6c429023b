"""Estimators against exact sums over every completion of a toy policy (float64)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillkit.functional.divergences import k1, k2, k3, reverse_kl
from distillkit.functional.objectives import clipped_policy_loss, importance_weights
from tests.functional.toy_policy import Prefix, ToyPolicy, prefixes, sequences


def kl_gradient(student: ToyPolicy, teacher: ToyPolicy, direction: str, weights: ToyPolicy | None = None) -> Tensor:
    """Σ_prefix P(prefix) ∇KL at that prefix, from the closed form in the logits (no autograd through a divergence)."""
    total = torch.zeros_like(student.parameters).flatten()
    for prefix in prefixes():
        p, q = student.logprobs(prefix).detach(), teacher.logprobs(prefix).detach()
        reverse, forward = p.exp() * (p - q - (p.exp() * (p - q)).sum()), p.exp() - q.exp()
        per_logit = reverse if direction == "reverse" else forward
        probability = (weights or student).probability(prefix)
        total = total + probability * student.gradient((student.logits(prefix) * per_logit).sum())
    return total


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_toy_policies_are_distributions(student: ToyPolicy, teacher: ToyPolicy) -> None:
    for policy in (student, teacher):
        assert sum(float(policy.probability(y)) for y in sequences()) == pytest.approx(1, abs=1e-12)


def test_expected_gradient_of_k1_as_a_loss_is_zero(student: ToyPolicy, teacher: ToyPolicy) -> None:
    loss = student.expected(lambda y: k1(student.of(y), teacher.of(y)).sum())
    assert student.gradient(loss).abs().max() < 1e-12
    assert kl_gradient(student, teacher, "reverse").norm() > 0.1  # there was something to miss


def test_expected_gradient_of_k2_as_a_loss_is_the_reverse_kls(student: ToyPolicy, teacher: ToyPolicy) -> None:
    loss = student.expected(lambda y: k2(student.of(y), teacher.of(y)).sum())
    assert relative(student.gradient(loss), kl_gradient(student, teacher, "reverse")) < 1e-9


def test_expected_gradient_of_k3_as_a_loss_is_the_forward_kls(student: ToyPolicy, teacher: ToyPolicy) -> None:
    loss = student.expected(lambda y: k3(student.of(y), teacher.of(y)).sum())
    assert relative(student.gradient(loss), kl_gradient(student, teacher, "forward")) < 1e-9
    assert relative(student.gradient(loss), kl_gradient(student, teacher, "reverse")) > 0.1


def policy_gradient(student: ToyPolicy, advantage: Callable[[Prefix], Tensor]) -> Tensor:
    """Gradient of E[clipped loss] on-policy, advantage(y) [T] detached."""

    def loss(y: Prefix) -> Tensor:
        logprobs = student.of(y)
        return clipped_policy_loss(logprobs - logprobs.detach(), advantage(y).detach(), 0.2, 0.2).sum()

    return student.gradient(student.expected(loss))


def test_k1_as_a_detached_advantage_follows_the_reverse_kl(student: ToyPolicy, teacher: ToyPolicy) -> None:
    got = policy_gradient(student, lambda y: -k1(student.of(y), teacher.of(y)))
    assert relative(got, kl_gradient(student, teacher, "reverse")) < 1e-9


def test_k1_as_a_reward_follows_the_kl_of_whole_sequences(student: ToyPolicy, teacher: ToyPolicy) -> None:
    def reward(y: Prefix) -> Tensor:
        return -k1(student.of(y), teacher.of(y)).sum().expand(len(y))

    exact = sum(student.of(y).sum().exp() * (student.of(y) - teacher.of(y)).sum() for y in sequences())
    assert relative(policy_gradient(student, reward), student.gradient(exact)) < 1e-9


def test_a_missing_stop_gradient_on_the_advantage_would_show(student: ToyPolicy, teacher: ToyPolicy) -> None:
    def leaky(y: Prefix) -> Tensor:
        logprobs = student.of(y)
        return clipped_policy_loss(logprobs - logprobs.detach(), -k1(logprobs, teacher.of(y)), 0.2, 0.2).sum()

    # ∇(r·k1) = k1·∇log π + ∇log π: the second term has no expectation, so the mean hides the bug; a sample does not.
    clean = policy_gradient(student, lambda y: -k1(student.of(y), teacher.of(y)))
    assert relative(student.gradient(student.expected(leaky)), clean) < 1e-9
    one = (1, 2, 3)
    leaked = student.gradient(leaky(one))
    logprobs = student.of(one)
    detached = clipped_policy_loss(logprobs - logprobs.detach(), -k1(logprobs, teacher.of(one)).detach(), 0.2, 0.2)
    assert relative(leaked, student.gradient(detached.sum())) > 0.05


def test_a_whole_divergence_as_an_advantage_says_nothing(student: ToyPolicy, teacher: ToyPolicy) -> None:
    def advantage(y: Prefix) -> Tensor:
        return -torch.stack([reverse_kl(student.logits(y[:t]), teacher.logits(y[:t])) for t in range(len(y))])

    assert policy_gradient(student, advantage).abs().max() < 1e-12


def test_a_whole_divergence_as_a_reward_steers_the_prefixes(student: ToyPolicy, teacher: ToyPolicy) -> None:
    def at(prefix: Prefix) -> Tensor:
        return reverse_kl(student.logits(prefix), teacher.logits(prefix)).detach()

    got = policy_gradient(student, lambda y: -sum(at(y[:t]) for t in range(len(y))).expand(len(y)))
    # Σ_prefix P_θ(prefix)·KL(prefix) with gradient through P_θ alone.
    reached = [student.of(p).sum().exp() * at(p) for p in prefixes() if p]
    assert relative(got, student.gradient(torch.stack(reached).sum())) < 1e-9


def test_k2_and_k3_as_advantages_are_no_divergence(student: ToyPolicy, teacher: ToyPolicy) -> None:
    got = policy_gradient(student, lambda y: -k3(student.of(y), teacher.of(y)))
    opposed = kl_gradient(student, teacher, "reverse") - kl_gradient(student, teacher, "forward")
    assert relative(got, opposed) < 1e-9

    # One token drawn from two; the teacher prefers token 0 by far, k2 as an advantage pushes it down all the same.
    logits = torch.tensor([-2.0, 2.0], dtype=torch.float64, requires_grad=True)
    ours, theirs = logits.log_softmax(-1), torch.tensor([2.0, -2.0], dtype=torch.float64).log_softmax(-1)
    taught = (ours.exp().detach() * k2(ours, theirs).detach() * ours)[0]
    (gradient,) = torch.autograd.grad(taught, logits)
    assert theirs[0] > ours[0] and gradient[0] > 0  # descending lowers the preferred token's logit


def test_values_are_unbiased(student: ToyPolicy, teacher: ToyPolicy) -> None:
    def reverse(prefix: Prefix) -> Tensor:
        p, q = student.logprobs(prefix), teacher.logprobs(prefix)
        return student.probability(prefix) * (p.exp() * (p - q)).sum()

    with torch.no_grad():
        exact = float(sum(reverse(prefix) for prefix in prefixes()))
        for estimator in (k1, k3):
            value = student.expected(lambda y, f=estimator: f(student.of(y), teacher.of(y)).sum())
            assert float(value) == pytest.approx(exact, rel=1e-12)
        biased = float(student.expected(lambda y: k2(student.of(y), teacher.of(y)).sum()))
        assert biased != pytest.approx(exact, rel=1e-2)
        assert min(float(k3(student.of(y), teacher.of(y)).min()) for y in sequences()) >= 0


def test_importance_weights_correct_another_engines_samples(
    student: ToyPolicy, teacher: ToyPolicy, behaviour: ToyPolicy
) -> None:
    def loss(y: Prefix) -> Tensor:
        weights = importance_weights(student.of(y), behaviour.of(y), cap=1e9)
        return (weights * k2(student.of(y), teacher.of(y))).sum()

    got = student.gradient(behaviour.expected(loss))
    assert relative(got, kl_gradient(student, teacher, "reverse", weights=behaviour)) < 1e-9
    uncorrected = student.gradient(behaviour.expected(lambda y: k2(student.of(y), teacher.of(y)).sum()))
    assert relative(uncorrected, kl_gradient(student, teacher, "reverse", weights=behaviour)) > 0.1


def test_a_joint_objective_adds_both_gradients(student: ToyPolicy, teacher: ToyPolicy) -> None:
    """KDRL: neither term may overwrite the other, and the coefficient scales the teacher's alone."""
    rewards = {y: torch.tensor(float(y[-1] == 2), dtype=torch.float64) for y in sequences()}

    def joint(y: Prefix, beta: float) -> Tensor:
        logprobs = student.of(y)
        policy = clipped_policy_loss(logprobs - logprobs.detach(), rewards[y].expand(len(y)), 0.2, 0.2).sum()
        return policy + beta * k2(logprobs, teacher.of(y)).sum()

    def gradient(beta: float) -> Tensor:
        return student.gradient(student.expected(lambda y: joint(y, beta)))

    exact = sum(student.of(y).sum().exp() * rewards[y] for y in sequences())
    assert relative(gradient(0.0), -student.gradient(exact)) < 1e-9
    assert relative(gradient(0.3) - gradient(0.0), 0.3 * kl_gradient(student, teacher, "reverse")) < 1e-9
