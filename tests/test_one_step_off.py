"""One-step-off: what overlaps, what is corrected, what is compared, and what the plain step has in common with it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import distillkit.loss
import distillkit.step
from distillkit.backends import LocalBackend
from distillkit.betas.adaptive_kl import AdaptiveKL
from distillkit.betas.constant import Constant
from distillkit.components import BetaScheduler
from distillkit.divergences.sampled import K2
from distillkit.errors import ConfigError, RolloutError, TrainingStopped
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.samplers.hf import HFSampler
from distillkit.samplers.mixed import MixedSampler
from distillkit.samplers.vllm import VLLMSampler
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.step import DistillationStep
from distillkit.types import RolloutBatch, RolloutGroup, SampleRequest, StepOutput
from tests import toy
from tests.test_scorer import local_teacher

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9]]


class OwnWeights(HFSampler):
    """The hf sampler on a copy of the student's weights: an engine of its own."""

    same_engine = False

    def sync(self, student: StudentScorer) -> None:
        super().sync(copy.deepcopy(student))


class SyncsOnce(OwnWeights):
    """Its weights stay those of the first step."""

    synced = False

    def sync(self, student: StudentScorer) -> None:
        if not self.synced:
            super().sync(student)
        self.synced = True


class Recording(LocalBackend):
    """Keeps the weights before, and the gradient of, every update."""

    def __init__(self, scorer: StudentScorer, lr: float) -> None:
        super().__init__(scorer, torch.optim.SGD(scorer.parameters(), lr=lr))
        self.gradients: list[Tensor] = []
        self.weights: list[dict[str, Tensor]] = []

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        self.weights.append(copy.deepcopy(self.scorer.state_dict()))
        found = [p.grad for p in self.scorer.parameters()]
        self.gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        return super().clip_and_norm(max_norm)


def requests(step: int) -> list[SampleRequest]:
    plain = toy.requests(PROMPTS)
    own = [replace(r, group_id=3 * step + i, seed=(3 * step + i) << 20) for i, r in enumerate(plain)]
    return [replace(request, policy_version=step) for request in own]


def stepper(sampler: HFSampler, *, ahead: bool, lr: float, beta: BetaScheduler | None = None) -> Any:
    parts = StepParts(
        sampler=sampler,
        teacher=local_teacher(toy.model(1)),
        divergence=K2(),
        beta=beta or Constant(value=1.0),
    )
    settings = StepSettings(tokens_per_micro_batch=60, one_step_off=ahead, max_grad_norm=None)
    step = DistillationStep(parts, settings, toy.scorer(0), toy.info())
    sampler.setup(toy.info())
    return step, Recording(step.scorer, lr)


def run(
    sampler: HFSampler, *, ahead: bool, steps: int = 3, lr: float = 0.3, beta: BetaScheduler | None = None
) -> tuple[list[StepOutput], Recording]:
    step, backend = stepper(sampler, ahead=ahead, lr=lr, beta=beta)
    outputs = []
    try:
        for n in range(steps):
            following = [replace(r, policy_version=n) for r in requests(n + 1)] if ahead and n + 1 < steps else ()
            outputs.append(step.run(requests(n), step=n, backend=backend, following=following))
    finally:
        step.close()
    return outputs, backend


def small(kind: type[HFSampler] = OwnWeights) -> HFSampler:
    return kind(group_size=4, max_new_tokens=8)


def logprobs(weights: dict[str, Tensor], rollouts: RolloutBatch) -> Tensor:
    """Log-probs [N, L] of some weights, computed apart from the step."""
    scorer = toy.scorer(0)
    scorer.load_state_dict(weights)
    with torch.no_grad():
        return scorer(rollouts, ScorePlan(sampling_temperature=1.0, distil_temperature=1.0)).logprobs


def test_rollouts_are_those_of_the_weights_one_update_ago() -> None:
    sampler = small()
    sampler.max_engine_gap = 1e-4  # of engine and trainer with the same weights
    outputs, backend = run(sampler, ahead=True)
    assert [output.metrics["train/staleness"] for output in outputs] == [0.0, 1.0, 1.0]
    for n, output in enumerate(outputs):
        rollouts = output.rollouts
        mask, behaviour = rollouts.loss_mask, rollouts.behaviour_logprobs
        assert set(rollouts.policy_version[mask].tolist()) == {max(n - 1, 0)}
        gaps = [(logprobs(w, rollouts) - behaviour)[mask].abs().mean() for w in backend.weights]
        assert gaps[max(n - 1, 0)] < 1e-5
        assert all(gap > 1e-3 for i, gap in enumerate(gaps) if i != max(n - 1, 0))
        if n:
            assert output.metrics["train/staleness_gap"] == pytest.approx(float(gaps[n]), rel=1e-4)
    assert all(output.metrics["train/engine_gap"] < 1e-5 for output in outputs[:-1])


def test_stale_tokens_are_weighted_by_the_truncated_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Tensor]] = []
    plain = distillkit.loss._off_policy

    def recorded(*arguments: Any) -> Any:
        correction = plain(*arguments)
        seen.append((arguments[-1], correction.distil))
        return correction

    monkeypatch.setattr(distillkit.loss, "_off_policy", recorded)
    outputs, backend = run(small(), ahead=True, steps=2)
    rollouts = outputs[1].rollouts
    mask = rollouts.loss_mask
    ratio = (logprobs(backend.weights[1], rollouts) - logprobs(backend.weights[0], rollouts)).exp()
    found = torch.zeros(mask.shape)
    for cut, weights in seen[-(len(seen) // 2) :]:
        found[cut] = weights
    torch.testing.assert_close(found[mask], ratio.clamp(max=2.0)[mask], rtol=1e-4, atol=1e-4)
    assert (ratio[mask] - 1).abs().max() > 0.05, "nothing to correct"


@pytest.mark.parametrize("beta", [lambda: Constant(value=1.0), lambda: AdaptiveKL(start=0.1, target=0.5)])
def test_where_the_policy_does_not_move_updates_are_those_of_the_plain_step(beta: Callable[[], BetaScheduler]) -> None:
    (ahead, ours), (plain, theirs) = (run(small(), ahead=a, lr=0.0, beta=beta()) for a in (True, False))
    for mine, other in zip(ahead, plain, strict=True):
        assert torch.equal(mine.rollouts.tokens, other.rollouts.tokens)
        assert mine.metrics["train/beta"] == pytest.approx(other.metrics["train/beta"], rel=1e-6)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm() and b.norm() > 0


def test_a_broken_sync_is_found_at_its_own_step_though_rollouts_are_stale() -> None:
    sampler = small(SyncsOnce)
    sampler.max_engine_gap = 1e-3
    step, backend = stepper(sampler, ahead=True, lr=0.3)
    step.run(requests(0), step=0, backend=backend, following=requests(1))
    with pytest.raises(TrainingStopped, match="step 2: the engine that sampled and the trainer disagree"):
        step.run(requests(1), step=1, backend=backend, following=requests(2))
    assert len(backend.weights) == 1, "no second update"
    step.close()


class Gated(OwnWeights):
    """From its second call on, samples only once an update has begun."""

    def __init__(self, began: threading.Event) -> None:
        super().__init__(group_size=4, max_new_tokens=8)
        self.began, self.sampled, self.calls = began, threading.Event(), 0

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.calls += 1
        probe = [request for request in requests if request.group_id < 0]
        yield from super().sample(probe)
        if self.calls > 1:
            assert self.began.wait(60), "the update waits for the rollouts of the step after"
        yield from super().sample([request for request in requests if request.group_id >= 0])
        self.sampled.set()


def test_the_next_rollouts_are_sampled_within_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()
    sampler, plain, inside = Gated(began), distillkit.step.update, []

    def slow(*arguments: Any) -> Any:
        sampler.sampled.clear()
        began.set()
        inside.append(sampler.sampled.wait(60))
        return plain(*arguments)

    monkeypatch.setattr(distillkit.step, "update", slow)
    step, backend = stepper(sampler, ahead=True, lr=0.3)
    step.run(requests(0), step=0, backend=backend, following=requests(1))
    step.close()
    assert inside == [True]


class Hanging(OwnWeights):
    """Its second call waits until it is broken off."""

    def __init__(self) -> None:
        super().__init__(group_size=4, max_new_tokens=8)
        self.calls, self.broken, self.left = 0, threading.Event(), threading.Event()

    def break_off(self) -> None:
        self.broken.set()

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.calls += 1
        if self.calls == 1:
            yield from super().sample(requests)
            return
        yield from super().sample(requests[:1])  # the probe
        self.broken.wait()
        self.left.set()
        raise RolloutError("broken off")


def test_the_end_of_a_run_breaks_off_what_is_being_sampled() -> None:
    sampler = Hanging()
    step, backend = stepper(sampler, ahead=True, lr=0.3)
    step.run(requests(0), step=0, backend=backend, following=requests(1))
    step.close()
    assert sampler.left.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts-ahead")]


class Failing(OwnWeights):
    """Its second call fails, before or after the probe is answered."""

    def __init__(self, answered: int) -> None:
        super().__init__(group_size=4, max_new_tokens=8)
        self.calls, self.answered = 0, answered

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.calls += 1
        if self.calls == 1:
            yield from super().sample(requests)
            return
        yield from super().sample(requests[: self.answered])
        raise RolloutError("the server is gone")


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_an_error_of_the_sampling_beside_an_update_comes_out_with_its_message(answered: int) -> None:
    step, backend = stepper(Failing(answered), ahead=True, lr=0.3)
    with pytest.raises(RolloutError, match="the server is gone"):
        step.run(requests(0), step=0, backend=backend, following=requests(1))
        assert step.state_dict()["ahead"] == {}, "a checkpoint in between is saved without them"
        step.run(requests(1), step=1, backend=backend)
    step.close()


@pytest.mark.parametrize(
    "sampler", [HFSampler(), VLLMSampler(sleep=True), MixedSampler(sampler=HFSampler(), on_policy_share=1.0)]
)
def test_samplers_that_cannot_sample_beside_an_update_are_refused(sampler: Any) -> None:
    parts = StepParts(sampler=sampler, teacher=local_teacher(toy.model(1)), divergence=K2(), beta=Constant(value=1.0))
    with pytest.raises(
        ConfigError, match=r"model.one_step_off: this sampler cannot sample .*\n    got:      \w+Sampler"
    ):
        DistillationStep(parts, StepSettings(one_step_off=True), toy.scorer(0), toy.info())
