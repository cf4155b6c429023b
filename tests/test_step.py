"""One step: its gradient against one plain formula, and what must not change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.betas.linear import Linear
from distillkit.components import DivergenceEstimator, PolicyObjective, RewardFn
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.sampled import K1, K2
from distillkit.errors import ConfigError
from distillkit.functional.advantages import group_advantages
from distillkit.maskers.response_level import ResponseLevel
from distillkit.models import enable_gradient_checkpointing
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.trrd import TRRD
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.scorer import StudentScorer
from distillkit.step import DistillationStep
from distillkit.types import RewardOutput, RolloutBatch, SampleRequest, StepOutput
from tests import toy
from tests.test_scorer import full_logits, local_teacher

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]


class EvenDigits(RewardFn):
    """1 where the completion starts with an even digit; the third rollout of every group cannot be scored."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        right = [text[0] in "02468" for text in rollouts.texts]
        lost = [i % 4 == 2 for i in range(len(right))]
        return RewardOutput.single(
            "even",
            [None if gone else float(ok) for ok, gone in zip(right, lost, strict=True)],
            status=["timed_out" if gone else "scored" for gone in lost],
            correct=[None if gone else ok for ok, gone in zip(right, lost, strict=True)],
        )


class GradientBackend(LocalBackend):
    """Keeps the gradient of every update and lets the parameters stand still unless asked to move."""

    def __init__(self, scorer: StudentScorer, lr: float = 0.0) -> None:
        super().__init__(scorer, torch.optim.SGD(scorer.parameters(), lr=lr))
        self.gradients: list[Tensor] = []
        self.forwards: list[int] = []

    def score(self, batch: RolloutBatch, *args: Any) -> Any:
        if torch.is_grad_enabled():
            self.forwards.append(len(batch))
        return super().score(batch, *args)

    def optimizer_step(self) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.scorer.parameters()]))
        super().optimizer_step()


def build(
    *,
    objective: PolicyObjective | None = None,
    divergence: DivergenceEstimator | None = None,
    rewards: Sequence[RewardFn] = (),
    settings: StepSettings | None = None,
    scorer: StudentScorer | None = None,
    **slots: Any,
) -> DistillationStep:
    scorer = scorer or toy.scorer(0)
    parts = StepParts(
        sampler=toy.RandomSampler(group_size=4, max_new_tokens=8),
        teacher=local_teacher(toy.model(1)) if divergence is not None or isinstance(objective, TRRD) else None,
        rewards=tuple(rewards),
        divergence=divergence,
        beta=Constant(value=0.3) if divergence is not None else None,
        objective=objective,
    )
    no_clip = replace(settings or StepSettings(), max_grad_norm=None)
    return DistillationStep(replace(parts, **slots), no_clip, scorer, toy.info())


def gradient(
    step: DistillationStep, requests: list[SampleRequest] | None = None
) -> tuple[Tensor, GradientBackend, StepOutput]:
    backend = GradientBackend(step.scorer)
    output = step.run(requests or toy.requests(PROMPTS), step=0, backend=backend)
    return backend.gradients[0], backend, output


def kdrl(settings: StepSettings | None = None, scorer: StudentScorer | None = None, **slots: Any) -> DistillationStep:
    return build(
        objective=GRPO(),
        divergence=K2(),
        rewards=[EvenDigits()],
        masker=ResponseLevel(),
        settings=settings,
        scorer=scorer,
        **slots,
    )


def close(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    gap = (ours - theirs).norm() / theirs.norm()
    assert gap < relative, f"relative difference of the gradient: {gap:.2e}"


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradient_is_that_of_the_formula_computed_in_one_piece(aggregation: Any) -> None:
    batch = toy.batch(PROMPTS)
    rewards = EvenDigits()(batch)
    advantages = group_advantages(rewards.total, batch.group_id)
    student, teacher = toy.model(0), toy.model(1)
    logp, logq = (
        full_logits(m, batch).log_softmax(-1).gather(-1, batch.tokens[batch.loss_mask][:, None])[:, 0]
        for m in (student, teacher)
    )
    counts = batch.loss_mask.sum(1)
    scored = ~rewards.total.isnan()
    loss, at = torch.zeros(()), 0
    policy_tokens, tokens = float(counts[scored].sum()), float(counts.sum())
    for i, length in enumerate(counts.tolist()):
        own, theirs = logp[at : at + length], logq[at : at + length].detach()
        at += length
        policy = -(own - own.detach()).exp() * advantages[i]
        kl = 0.3 * (own - theirs) ** 2 / 2 * float(rewards.correct[i] == 0)
        if aggregation == "token":
            loss = loss + policy.sum() / policy_tokens + kl.sum() / tokens
        elif aggregation == "sequence":
            loss = loss + policy.mean() / float(scored.sum()) + kl.mean() / len(counts)
        else:
            loss = loss + policy.sum() / (float(scored.sum()) * 8) + kl.sum() / (len(counts) * 8)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    step = build(
        objective=GRPO(aggregation=aggregation), divergence=K2(), rewards=[EvenDigits()], masker=ResponseLevel()
    )
    found, _, output = gradient(step)
    close(found, expected)
    assert output.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


SAME: dict[str, Callable[[], DistillationStep]] = {
    "micro-batches of one rollout": lambda: kdrl(StepSettings(tokens_per_micro_batch=1)),
    "micro-batches of 30 tokens": lambda: kdrl(StepSettings(tokens_per_micro_batch=30)),
    "head chunks of 1 position": lambda: kdrl(scorer=toy.scorer(0, head_chunk=1)),
    "head chunks of 7 positions": lambda: kdrl(scorer=toy.scorer(0, head_chunk=7)),
    "zero-weight rollouts not skipped": lambda: kdrl(StepSettings(skip_zero_weight=False)),
    "gradient checkpointing": lambda: kdrl(scorer=_checkpointed()),
}


def _checkpointed() -> StudentScorer:
    scorer = toy.scorer(0)
    enable_gradient_checkpointing(scorer.model)
    return scorer.train()


@pytest.mark.parametrize("name", SAME)
def test_gradient_does_not_change_with(name: str) -> None:
    close(gradient(SAME[name]())[0], gradient(kdrl())[0])


def test_gradient_does_not_change_with_the_order_of_rollouts() -> None:
    close(gradient(kdrl(), toy.requests(PROMPTS)[::-1])[0], gradient(kdrl())[0])


def test_gradient_does_not_change_with_padding() -> None:
    step = kdrl()
    original = RolloutBatch.from_groups

    def padded(groups: Any, pad_id: int) -> RolloutBatch:
        batch = original(groups, pad_id)
        extra = {
            name: torch.nn.functional.pad(getattr(batch, name), (0, 9))
            for name in ("tokens", "attention_mask", "loss_mask", "behaviour_logprobs", "policy_version")
        }
        return replace(batch, **extra)

    RolloutBatch.from_groups = staticmethod(padded)  # type: ignore[method-assign, assignment]
    try:
        ours = gradient(step)[0]
    finally:
        RolloutBatch.from_groups = staticmethod(original)  # type: ignore[method-assign]
    close(ours, gradient(kdrl())[0])


def test_zero_weight_rollouts_are_not_sent_through_the_student() -> None:
    _, backend, output = gradient(kdrl())
    rewards = EvenDigits()(output.rollouts)
    advantages = group_advantages(rewards.total, output.rollouts.group_id)
    needed = ((advantages != 0) | (rewards.correct == 0)).sum()
    assert 0 < int(needed) < len(output.rollouts)
    assert sum(backend.forwards) == int(needed)


def test_the_distillation_weight_changes_the_gradient() -> None:
    one = gradient(kdrl())[0]
    other = gradient(kdrl(beta=Constant(value=0.6)))[0]
    assert (one - other).norm() / one.norm() > 0.05


def test_k1_as_an_advantage_has_the_policy_gradient_of_the_log_ratio() -> None:
    through = StepSettings(distill_through="advantage")
    found, _, _ = gradient(build(objective=GRPO(), divergence=K1(), settings=through))
    batch = toy.batch(PROMPTS)
    student, teacher = toy.model(0), toy.model(1)
    ids = batch.tokens[batch.loss_mask][:, None]
    logp, logq = (full_logits(m, batch).log_softmax(-1).gather(-1, ids)[:, 0] for m in (student, teacher))
    (-(0.3 * (logq - logp)).detach() * logp).mean().backward()
    close(found, torch.cat([p.grad.flatten() for p in student.parameters()]))


def test_an_advantage_divergence_is_frozen_across_inner_epochs() -> None:
    settings = StepSettings(distill_through="advantage", inner_epochs=2)
    step = build(objective=GRPO(clip_low=1, clip_high=9), divergence=K1(), settings=settings)
    backend = GradientBackend(step.scorer)
    step.run(toy.requests(PROMPTS), step=0, backend=backend)
    close(backend.gradients[1], backend.gradients[0], relative=1e-4)


@pytest.mark.parametrize("shaping", ["mean", "sum"])
def test_a_divergence_as_a_reward_is_normalised_within_its_group(shaping: Any) -> None:
    settings = StepSettings(distill_through="reward", reward_shaping=shaping)
    _, _, output = gradient(build(objective=GRPO(), divergence=K1(), rewards=[EvenDigits()], settings=settings))
    batch, rewards = output.rollouts, EvenDigits()(output.rollouts)
    ids = batch.tokens[batch.loss_mask][:, None]
    logp, logq = (full_logits(toy.model(s), batch).log_softmax(-1).gather(-1, ids)[:, 0] for s in (0, 1))
    per_rollout = [
        gap.mean() if shaping == "mean" else gap.sum() for gap in (logp - logq).split(batch.loss_mask.sum(1).tolist())
    ]
    shaped = rewards.total - 0.3 * torch.stack(per_rollout).detach()
    expected = group_advantages(shaped, batch.group_id)
    found = output.per_token["advantages"].gather(1, batch.prompt_lengths[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_minibatches_are_two_updates_over_disjoint_rollouts() -> None:
    step = kdrl(StepSettings(minibatches=2, skip_zero_weight=False))
    backend = GradientBackend(step.scorer)
    output = step.run(toy.requests(PROMPTS), step=0, backend=backend)
    assert output.updates == 2
    assert sum(backend.forwards) == len(output.rollouts)
    assert not torch.allclose(backend.gradients[0], backend.gradients[1])


def test_a_later_inner_epoch_clips_against_the_policy_that_sampled() -> None:
    def both_gradients(low: float, high: float) -> list[Tensor]:
        settings = StepSettings(inner_epochs=2)
        step = build(objective=GRPO(clip_low=low, clip_high=high), rewards=[EvenDigits()], settings=settings)
        backend = GradientBackend(step.scorer, lr=0.05)
        step.run(toy.requests(PROMPTS), step=0, backend=backend)
        return backend.gradients

    tight, loose = both_gradients(0.01, 0.01), both_gradients(1.0, 9.0)
    close(tight[0], loose[0])
    assert (tight[1] - loose[1]).norm() / loose[1].norm() > 0.1


def test_a_non_finite_loss_drops_the_update_and_is_counted() -> None:
    class Broken(K2):
        def __call__(self, student: Any, teacher: Any) -> Tensor:
            return super().__call__(student, teacher) * float("inf")

    step = build(divergence=Broken())
    before = [p.clone() for p in step.scorer.parameters()]
    backend = GradientBackend(step.scorer, lr=1.0)
    output = step.run(toy.requests(PROMPTS), step=0, backend=backend)
    assert (output.updates, output.skipped, output.metrics["train/skipped_updates"]) == (0, 1, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step.scorer.parameters(), strict=True))


def test_a_finite_loss_with_a_non_finite_gradient_drops_the_update_too() -> None:
    class NanGradient(K2):
        def __call__(self, student: Any, teacher: Any) -> Tensor:
            value = super().__call__(student, teacher)
            return value + (student.sampled - student.sampled.detach()).abs().sqrt()

    step = build(divergence=NanGradient())
    output = step.run(toy.requests(PROMPTS), step=0, backend=GradientBackend(step.scorer, lr=1.0))
    assert output.skipped == 1
    assert abs(output.metrics["train/loss"]) < float("inf")


def test_schedules_reach_the_parts_and_leave_them_as_they_are() -> None:
    schedules = {
        "sampler.max_new_tokens": Linear(start=2, end=8, steps=10),
        "policy_weight": Linear(start=1, end=0, steps=2),
    }
    step = kdrl(schedules=schedules)
    backend = GradientBackend(step.scorer)
    first = step.run(toy.requests(PROMPTS), step=0, backend=backend)
    later = step.run(toy.requests(PROMPTS), step=10, backend=backend)
    assert int(first.rollouts.completion_lengths.max()) <= 2
    assert int(later.rollouts.completion_lengths.max()) > 2
    assert first.metrics["schedule/policy_weight"] == 1.0
    assert later.metrics["schedule/policy_weight"] == 0.0
    assert torch.count_nonzero(later.per_token["advantages"]) == 0
    assert step.parts.sampler.max_new_tokens == 8


def test_an_unknown_schedule_is_refused_with_the_numbers_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        kdrl(schedules={"sampler.temprature": Constant(value=1.0)})
    assert str(caught.value) == (
        "model.schedules.sampler.temprature: no such number\n"
        "    got:      sampler.temprature\n"
        "    expected: policy_weight, distil_temperature, sampler.group_size, sampler.max_new_tokens, "
        "sampler.temperature, sampler.top_p, objective.correction, objective.eps, objective.clip_low, "
        "objective.clip_high\n"
        "    try:      sampler.temperature"
    )


def test_trrd_runs_with_a_teacher_and_no_divergence() -> None:
    found, _, output = gradient(build(objective=TRRD(), rewards=[EvenDigits()]))
    assert found.norm() > 0
    assert "train/divergence" not in output.metrics


def test_reference_divergence_pulls_towards_the_reference() -> None:
    step = build(
        objective=GRPO(), rewards=[EvenDigits()], reference=local_teacher(toy.model(2)),
        reference_divergence=ReverseKL(),
        reference_beta=Constant(value=5.0),
    )  # fmt: skip
    backend = GradientBackend(step.scorer, lr=0.02)
    values = [
        step.run(toy.requests(PROMPTS), step=i, backend=backend).metrics["train/reference_divergence"]
        for i in range(12)
    ]
    assert values[-1] < 0.7 * values[0]


def test_the_gap_is_recorded_at_the_temperature_of_the_teacher() -> None:
    _, _, output = gradient(kdrl(StepSettings(distil_temperature=2.0, skip_zero_weight=False)))
    mask = output.rollouts.loss_mask
    ids = output.rollouts.tokens[mask][:, None]
    expected = (full_logits(toy.model(0), output.rollouts) / 2.0).log_softmax(-1).gather(-1, ids)[:, 0]
    torch.testing.assert_close(output.per_token["distil_logprobs"][mask], expected.detach(), rtol=0, atol=1e-5)
    assert "distil_logprobs" not in gradient(kdrl())[2].per_token


@pytest.mark.parametrize("objective", [GRPO(), TRRD(alpha=0.5)])
def test_metrics_do_not_depend_on_whether_rollouts_without_weight_are_sent(objective: PolicyObjective) -> None:
    def metrics(skip: bool) -> dict[str, float]:
        slots: Any = {"masker": ResponseLevel(), "sampler": toy.RandomSampler(group_size=4, max_new_tokens=8)}
        settings = StepSettings(skip_zero_weight=skip)
        step = build(objective=objective, divergence=K2(), rewards=[EvenDigits()], settings=settings, **slots)
        _, backend, output = gradient(step)
        assert (sum(backend.forwards) < len(output.rollouts)) == skip
        return {k: v for k, v in output.metrics.items() if k.startswith("train/")}

    skipping, sending = metrics(skip=True), metrics(skip=False)
    assert {"train/divergence", "train/loss"} < set(skipping) == set(sending)
    assert skipping == pytest.approx(sending, rel=1e-5)


class Equal(RewardFn):
    """The same for all; 0.1 is a number that a mean in float32 need not give back."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        return RewardOutput.single("equal", [0.1] * len(rollouts))


@pytest.mark.parametrize("skip", [True, False])
def test_without_anything_to_learn_the_optimizer_stands_still(skip: bool) -> None:
    step = build(objective=GRPO(), rewards=[Equal()], settings=StepSettings(minibatches=2, skip_zero_weight=skip))
    before = [p.clone() for p in step.scorer.parameters()]
    decaying = torch.optim.AdamW(step.scorer.parameters(), lr=0.1, weight_decay=0.5)
    output = step.run(toy.requests(PROMPTS), step=0, backend=LocalBackend(step.scorer, decaying))
    assert (output.updates, output.skipped, output.metrics["train/empty_updates"]) == (0, 0, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step.scorer.parameters(), strict=True))


def test_phases_are_timed_and_rollout_rows_line_up() -> None:
    _, _, output = gradient(kdrl())
    assert {"time/rollout", "time/teacher", "time/reward", "time/update", "time/step"} <= set(output.metrics)
    assert {"tokens_per_second/rollout", "tokens_per_second/teacher", "tokens_per_second/update"} <= set(output.metrics)
    assert output.rollouts.group_id.tolist() == [100] * 4 + [101] * 4 + [102] * 4
    assert output.metrics["train/timed_out/even"] == 3
    assert output.metrics["train/unscored"] == 3


@pytest.mark.parametrize("through", ["advantage", "reward"])
def test_a_frozen_divergence_is_computed_once(through: Any) -> None:
    class Counted(K1):
        calls = 0

        def __call__(self, student: Any, teacher: Any) -> Tensor:
            type(self).calls += 1
            return super().__call__(student, teacher)

    settings = StepSettings(distill_through=through, inner_epochs=3, tokens_per_micro_batch=10_000)
    _, backend, output = gradient(
        build(objective=GRPO(), divergence=Counted(), rewards=[EvenDigits()], settings=settings)
    )
    assert (len(backend.gradients), Counted.calls) == (3, 1)
    assert torch.isfinite(output.per_token["divergence"][output.rollouts.loss_mask]).all()
    assert output.metrics["train/divergence"] != 0
