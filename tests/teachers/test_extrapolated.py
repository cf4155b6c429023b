"""G-OPD's teacher: its scores by hand, its limits, and the gradient it gives, summed over everything."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.divergences.sampled import K1, K2
from distillkit.errors import ConfigError, ScoringError
from distillkit.functional.divergences import k1, k2, k3
from distillkit.objectives.grpo import GRPO
from distillkit.prepared import StepSettings
from distillkit.teachers.extrapolated import ExtrapolatedTeacher
from distillkit.testing import FakeTeacher, check, encode, rollout_batch, student_info
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores, TokenScores
from tests import toy
from tests.functional.toy_policy import ToyPolicy, prefixes, table
from tests.test_scorer import local_teacher
from tests.test_step import build, gradient

SAMPLED = ScoreRequest(sampled=True)


class Watched(FakeTeacher):
    """A fake that says what was asked of it, and that it is set up and torn down."""

    def __init__(self, *, logits: tuple[float, ...] | None = None, blind_to: str = "", floor: float = 0.0) -> None:
        super().__init__(logits=logits, blind_to=blind_to)
        self.floor = floor
        self.asked: list[str] = []

    def setup(self, student: StudentInfo) -> None:
        self.asked.append("setup")

    def teardown(self) -> None:
        self.asked.append("teardown")

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        self.asked.append(f"score at {request.temperature:g}")
        scores = super().score(rollouts, request)
        return replace(scores, sampled=scores.sampled + self.floor if scores.sampled is not None else None)


class Silent(FakeTeacher):
    """Offers everything and gives nothing."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        return TeacherScores(valid=rollouts.loss_mask)


class TopOnly(FakeTeacher):
    """A teacher without sampled log-probs."""

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(topk=4)


class Wide(FakeTeacher):
    """A padded output head."""

    @property
    def vocab_size(self) -> int:
        return 128


def extrapolated(teacher: TeacherScorer, base: TeacherScorer, strength: float) -> ExtrapolatedTeacher:
    part = ExtrapolatedTeacher(teacher=teacher, base=base, strength=strength)
    part.setup(student_info())
    return part


def scores(part: TeacherScorer, batch: RolloutBatch, request: ScoreRequest = SAMPLED) -> Tensor:
    sampled = part.score(batch, request).sampled
    assert sampled is not None
    return sampled


def logits_of(probabilities: dict[str, float], rest: float) -> tuple[float, ...]:
    """Logits under which single characters have these probabilities, and all other tokens share `rest`."""
    size = 99
    each = rest / (size - len(probabilities))
    ids = {encode(character)[0]: p for character, p in probabilities.items()}
    return tuple(math.log(ids.get(i, each)) for i in range(size))


def test_scores_are_those_worked_out_by_hand() -> None:
    batch = rollout_batch({"1+1=": ["2", "3"]}, max_new_tokens=1)
    teacher = FakeTeacher(logits=logits_of({"2": 0.5, "3": 0.25}, 0.25))
    base = FakeTeacher(logits=logits_of({"2": 0.25, "3": 0.5}, 0.25))
    # 2 · log ½ − log ¼ = 0, 2 · log ¼ − log ½ = −3 · log 2
    found = scores(extrapolated(teacher, base, 2.0), batch)
    assert found[:, -1].tolist() == pytest.approx([0.0, -3 * math.log(2)], abs=1e-6)
    # ½ · log ½ + ½ · log ¼ = −1.5 · log 2, the other way round the same
    found = scores(extrapolated(teacher, base, 0.5), batch)
    assert found[:, -1].tolist() == pytest.approx([-1.5 * math.log(2)] * 2, abs=1e-6)
    assert found[:, :-1].abs().max() == 0


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_k1_is_equation_14(strength: float) -> None:
    batch, generator = rollout_batch(), torch.Generator().manual_seed(0)
    teacher, base = FakeTeacher(), FakeTeacher(logits=(3.0, 2.0, 1.0, 0.5))
    mask = batch.loss_mask
    ours, log_t, log_ref = (
        torch.rand(mask.shape, generator=generator).log(),
        scores(teacher, batch),
        scores(base, batch),
    )
    found = scores(extrapolated(teacher, base, strength), batch)
    cost = K1()(TokenScores(sampled=ours[mask]), TokenScores(sampled=found[mask]))
    expected = (ours - log_t) + (strength - 1) * (log_ref - log_t)
    torch.testing.assert_close(cost, expected[mask], rtol=1e-6, atol=1e-6)


def test_strength_1_is_the_teacher_bit_for_bit_and_the_base_is_never_used() -> None:
    teacher, base, batch = Watched(blind_to="#"), Watched(logits=(3.0,)), rollout_batch(observation="4")
    part = extrapolated(teacher, base, 1.0)
    request = ScoreRequest(sampled=True, temperature=0.7)
    found, alone = part.score(batch, request), FakeTeacher(blind_to="#").score(batch, request)
    part.teardown()
    assert torch.equal(found.sampled, alone.sampled) and torch.equal(found.valid, alone.valid)
    assert teacher.asked == ["setup", "score at 0.7", "teardown"]
    assert base.asked == []


def test_strength_0_is_the_base_bit_for_bit_and_the_teacher_is_never_used() -> None:
    teacher, base, batch = Watched(), Watched(logits=(3.0,)), rollout_batch()
    assert torch.equal(scores(extrapolated(teacher, base, 0.0), batch), scores(FakeTeacher(logits=(3.0,)), batch))
    assert (teacher.asked, base.asked) == ([], ["setup", "score at 1"])


def test_both_are_set_up_scored_at_the_same_temperature_and_torn_down() -> None:
    teacher, base = Watched(), Watched(logits=(3.0,))
    part = extrapolated(teacher, base, 1.25)
    part.score(rollout_batch(), ScoreRequest(sampled=True, temperature=2.0))
    part.teardown()
    assert teacher.asked == base.asked == ["setup", "score at 2", "teardown"]


def test_a_position_counts_where_both_could_score_it_and_the_result_is_finite() -> None:
    batch = rollout_batch({"1+1=": ["2#3"]}, max_new_tokens=3)
    both = extrapolated(FakeTeacher(blind_to="2"), FakeTeacher(blind_to="3"), 1.25).score(batch, SAMPLED)
    assert both.valid[0, 4:].tolist() == [False, True, False]
    endless = extrapolated(FakeTeacher(), Watched(floor=-math.inf), 1.25).score(batch, SAMPLED)
    assert not endless.valid.any()
    assert endless.sampled is not None and endless.sampled.isfinite().all()


def test_only_sampled_log_probs_are_offered_and_only_where_all_models_in_use_give_them() -> None:
    assert ExtrapolatedTeacher(teacher=FakeTeacher(), base=FakeTeacher(), strength=1.25).offers == SAMPLED
    assert ExtrapolatedTeacher(teacher=FakeTeacher(), base=TopOnly(), strength=1.25).offers == ScoreRequest()
    assert ExtrapolatedTeacher(teacher=FakeTeacher(), base=TopOnly(), strength=1.0).offers == SAMPLED


def test_vocabulary_and_identity_are_those_of_the_models_in_use() -> None:
    def part(strength: float) -> ExtrapolatedTeacher:
        return ExtrapolatedTeacher(teacher=Wide(), base=FakeTeacher(logits=(1.0,)), strength=strength)

    assert [part(s).vocab_size for s in (0.0, 0.5, 1.0)] == [99, 99, 128]
    assert part(1.25).identity() == "extrapolated:1.25:fake:None::fake:(1.0,):"
    assert part(1.0).identity() == "extrapolated:1.0:fake:None:"
    assert len({part(s).identity() for s in (0.0, 0.5, 1.0, 1.25)}) == 4


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_conformance(strength: float) -> None:
    """For strengths above 1, scores may be above 0, which the suite refuses."""
    check(ExtrapolatedTeacher(teacher=FakeTeacher(), base=FakeTeacher(logits=(2.0, 1.0)), strength=strength))


@pytest.mark.parametrize("strength", [-0.5, math.inf, math.nan])
def test_a_strength_that_means_nothing_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError) as caught:
        ExtrapolatedTeacher(teacher=FakeTeacher(), base=FakeTeacher(), strength=strength)
    assert str(caught.value) == (
        "model.teacher.strength: how far to go along the way from base to teacher\n"
        f"    got:      {strength}\n"
        "    expected: a finite number, at least 0\n"
        "    try:      1.25"
    )


def test_a_model_that_does_not_give_what_it_offers_is_named() -> None:
    with pytest.raises(ScoringError) as caught:
        extrapolated(FakeTeacher(), Silent(), 1.25).score(rollout_batch(), SAMPLED)
    assert str(caught.value) == "ExtrapolatedTeacher.score: no sampled log-probs were returned\n    got:      Silent"


# ---- what the missing constant log Z(prefix) changes, and what it does not


def policies() -> tuple[ToyPolicy, ToyPolicy, ToyPolicy]:
    student, teacher, base = (table(torch.Generator().manual_seed(seed)) for seed in range(3))
    return student, teacher, base


def expected_gradient(student: ToyPolicy, target: dict[tuple[int, ...], Tensor], kind: str) -> Tensor:
    """E over on-policy samples of a per-token signal's gradient; `target` are the log-scores [V] of each prefix."""

    def value(sequence: tuple[int, ...]) -> Tensor:
        ours = student.of(sequence)
        theirs = torch.stack([target[sequence[:t]][token] for t, token in enumerate(sequence)])
        if kind == "k1 advantage":
            return (k1(ours, theirs).detach() * ours).sum()
        if kind == "k1 reward":
            return k1(ours, theirs).detach().sum() * ours.sum()
        return {"k2 loss": k2, "k3 loss": k3}[kind](ours, theirs).sum()

    return student.gradient(student.expected(value))


@pytest.mark.parametrize(
    ("kind", "matters"), [("k1 advantage", False), ("k2 loss", False), ("k3 loss", True), ("k1 reward", True)]
)
def test_where_the_missing_normaliser_matters(kind: str, matters: bool) -> None:
    student, teacher, base = policies()
    with torch.no_grad():
        raw = {p: 1.25 * teacher.logprobs(p) - 0.25 * base.logprobs(p) for p in prefixes()}
    normalised = {p: scores.log_softmax(-1) for p, scores in raw.items()}
    assert max(abs(float(s.logsumexp(-1))) for s in raw.values()) > 0.05
    ours, exact = (expected_gradient(student, target, kind) for target in (raw, normalised))
    assert (float((ours - exact).norm() / exact.norm()) > 1e-2) == matters
    if not matters:
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1 advantage", "k2 loss"])
def test_the_expected_gradient_is_that_of_the_kl_to_the_normalised_mixture(kind: str) -> None:
    student, teacher, base = policies()
    with torch.no_grad():
        target = {p: 1.25 * teacher.logprobs(p) - 0.25 * base.logprobs(p) for p in prefixes()}
    kl = torch.stack(
        [
            student.probability(p) * (student.logprobs(p).exp() * (student.logprobs(p) - t.log_softmax(-1))).sum()
            for p, t in target.items()
        ]
    ).sum()
    torch.testing.assert_close(expected_gradient(student, target, kind), student.gradient(kl), rtol=1e-9, atol=1e-12)


# ---- in a step


@pytest.mark.parametrize(("divergence", "through"), [(K1(), "advantage"), (K2(), "loss")])
def test_a_step_at_strength_1_is_on_policy_distillation_bit_for_bit(divergence: K1 | K2, through: str) -> None:
    settings = StepSettings(distill_through=through)  # type: ignore[arg-type]
    teacher, base = local_teacher(toy.model(1)), local_teacher(toy.model(2))

    def moved(part: TeacherScorer) -> Tensor:
        objective = GRPO() if through == "advantage" else None
        return gradient(build(objective=objective, divergence=divergence, settings=settings, teacher=part))[0]

    plain = moved(teacher)
    assert plain.norm() > 0
    assert torch.equal(moved(ExtrapolatedTeacher(teacher=teacher, base=base, strength=1.0)), plain)
    further = moved(ExtrapolatedTeacher(teacher=teacher, base=base, strength=1.25))
    assert float((further - plain).norm() / plain.norm()) > 0.01


def test_a_step_is_linear_in_the_strength() -> None:
    """Eq. 14: the gradient at λ is (1−λ) times the KL to the base plus λ times on-policy distillation."""
    settings = StepSettings(distill_through="advantage")
    teacher, base = local_teacher(toy.model(1)), local_teacher(toy.model(2))

    def moved(strength: float) -> Tensor:
        part = ExtrapolatedTeacher(teacher=teacher, base=base, strength=strength)
        return gradient(build(objective=GRPO(), divergence=K1(), settings=settings, teacher=part))[0].double()

    expected = 1.5 * moved(1.0) - 0.5 * moved(0.0)
    assert float((moved(1.5) - expected).norm() / expected.norm()) < 1e-5
