"""The vocabulary in tiles against whole logits: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distillkit import backbone, streamed
from distillkit.components import DivergenceEstimator
from distillkit.divergences.full import JSD, ForwardKL, ReverseKL
from distillkit.divergences.sampled import K1, K2, K3
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.streamed import Head, stream
from distillkit.types import RolloutBatch, ScoreRequest, StudentScores, TeacherScores, TokenScores
from tests import toy
from tests.test_chunks import HEADS, LIMIT, WHOLE, rollouts
from tests.test_scorer import LargestTensor, local_teacher

WIDE = torch.float64
ROWS, WIDTH, VOCABULARY = 11, 5, 23


@pytest.fixture(params=[(4, 3), (7, 1024), (1024, 4), (1024, 1024)], ids=["4x3", "7 columns", "4 rows", "one tile"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_TILE", request.param[0])
    monkeypatch.setattr(streamed, "_ROWS", request.param[1])


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Few logits make several chunks; the list gets an entry for every call of `stream`."""
    monkeypatch.setitem(backbone._CHUNK_ELEMENTS, "cpu", 16 * LIMIT)
    calls: list[str] = []
    for place in ("distillkit.positions", "distillkit.teachers.scoring"):

        def noted(*args: object, where: str = place, **more: object) -> streamed.Streamed:
            calls.append(where)
            return stream(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(f"{place}.stream", noted)
    yield calls


def head(
    seed: int, dtype: torch.dtype = WIDE, *, rows: int = ROWS, scale: float = 1.0, temperature: float = 1.0
) -> Head:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, WIDTH, generator=generator, dtype=WIDE) * scale
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=WIDE)
    own = {"states": states.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}
    return Head(**own, temperature=temperature)


def expected(
    own: Head, other: Head, targets: Tensor, limit: int, temperature: float, direction: str | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Of `Streamed`, from whole logits in the width of the states."""
    logp, logq = (((h.states @ h.weight.t())[:, :limit] / temperature).log_softmax(-1) for h in (own, other))
    values = {
        "reverse_kl": (logp.exp() * (logp - logq)).sum(-1),
        "forward_kl": (logq.exp() * (logq - logp)).sum(-1),
    }
    picked, other_picked = (x.gather(-1, targets[:, None]).squeeze(-1) for x in (logp, logq))
    return picked, values.get(direction or ""), -(logp.exp() * logp).sum(-1), other_picked


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("limit", [VOCABULARY, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl", None])
def test_values_and_gradients_are_those_of_whole_logits(
    direction: Literal["reverse_kl", "forward_kl"] | None, temperature: float, limit: int
) -> None:
    own, other = head(0, temperature=temperature), head(1, temperature=temperature)
    targets = torch.randint(limit, (ROWS,), generator=torch.Generator().manual_seed(2))
    frozen = replace(other, states=other.states.detach(), weight=other.weight.detach())
    found = stream(own, targets, limit=limit, entropy=True, other=frozen, divergence=direction)
    ours = (found.logprobs, found.divergence, found.entropy, found.other_logprobs)
    theirs = expected(own, other, targets, limit, temperature, direction)
    for column, wanted in zip(ours, theirs, strict=True):
        assert (column is None) == (wanted is None)
        if column is not None and wanted is not None:
            torch.testing.assert_close(column, wanted, rtol=0, atol=1e-12)
    weights = torch.rand(2, ROWS, dtype=WIDE, generator=torch.Generator().manual_seed(3))
    for which in ([0], [1], [0, 1]):
        chosen = [i for i in which if ours[i] is not None]
        if not chosen:
            continue
        sides = []
        for columns in (ours, theirs):
            loss = torch.stack([weights[i] @ columns[i] for i in chosen if columns[i] is not None]).sum()  # type: ignore[operator]
            sides.append(torch.autograd.grad(loss, [own.states, own.weight], retain_graph=True))
        for mine, wanted in zip(*sides, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
            assert wanted.abs().max() > 1e-3
    assert found.entropy is not None and not found.entropy.requires_grad
    assert found.other_logprobs is not None and not found.other_logprobs.requires_grad


@pytest.mark.usefixtures("tiles")
def test_by_hand() -> None:
    own = Head(states=torch.ones(1, 1), weight=torch.tensor([[0.0], [math.log(3.0)]]).requires_grad_())
    other = Head(states=torch.ones(1, 1), weight=torch.zeros(2, 1))
    found = stream(own, torch.tensor([1]), limit=2, entropy=True, other=other, divergence="reverse_kl")
    assert found.logprobs.exp().item() == pytest.approx(0.75)
    assert found.divergence is not None and found.entropy is not None and found.other_logprobs is not None
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.divergence.item() == pytest.approx(wanted, abs=1e-6)
    assert found.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert found.other_logprobs.exp().item() == pytest.approx(0.5)
    [slope] = torch.autograd.grad(found.divergence, own.weight)
    assert slope[1].item() == pytest.approx(0.75 * (math.log(1.5) - wanted), abs=1e-6)
    assert slope[0].item() == pytest.approx(-slope[1].item(), abs=1e-6)


@pytest.mark.usefixtures("tiles")
def test_logits_of_any_size_overflow_nowhere() -> None:
    own, other = head(0, torch.float32, scale=1e4), head(1, torch.float32, scale=1e4)
    targets = torch.zeros(ROWS, dtype=torch.long)
    found = stream(own, targets, limit=VOCABULARY, entropy=True, other=other, divergence="reverse_kl")
    wide = [Head(states=h.states.double(), weight=h.weight.double()) for h in (own, other)]
    theirs = expected(*wide, targets, VOCABULARY, 1.0, "reverse_kl")
    for column, wanted in zip((found.logprobs, found.divergence, found.entropy), theirs[:3], strict=True):
        assert column is not None and wanted is not None
        torch.testing.assert_close(column.double(), wanted, rtol=1e-5, atol=1e-2)
    assert found.divergence is not None
    grads = torch.autograd.grad((found.divergence + found.logprobs).sum(), [own.states, own.weight])
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.usefixtures("tiles")
def test_no_positions_have_a_gradient_of_nothing() -> None:
    own, other = head(0, rows=0), head(1, rows=0)
    found = stream(own, torch.zeros(0, dtype=torch.long), limit=20, other=other, divergence="forward_kl")
    assert found.divergence is not None and found.divergence.shape == found.logprobs.shape == (0,)
    states, weight = torch.autograd.grad((found.divergence + found.logprobs).sum(), [own.states, own.weight])
    assert states.shape == (0, WIDTH) and weight.abs().max() == 0


def test_a_target_beyond_the_softmax_is_refused() -> None:
    with pytest.raises(IndexError, match="token id 20 has no place in a softmax over 20 ids"):
        stream(head(0), torch.full((ROWS,), 20), limit=20)


def test_a_frozen_head_gets_no_gradient() -> None:
    own = head(0)
    frozen = Head(states=own.states, weight=own.weight.detach())
    stream(frozen, torch.zeros(ROWS, dtype=torch.long), limit=VOCABULARY).logprobs.sum().backward()
    assert own.states.grad is not None and own.weight.grad is None


@pytest.mark.usefixtures("tiles")
def test_narrow_weights_are_summed_wide() -> None:
    own, other = head(0, torch.bfloat16), head(1, torch.bfloat16)
    targets = torch.arange(ROWS)
    found = stream(own, targets, limit=VOCABULARY, other=other, divergence="reverse_kl")
    logits = [(h.states @ h.weight.t()).double() for h in (own, other)]  # products in bfloat16, as a layer has them
    eye = torch.eye(VOCABULARY, dtype=WIDE)
    whole = [Head(states=z, weight=eye) for z in logits]
    theirs = expected(*whole, targets, VOCABULARY, 1.0, "reverse_kl")
    assert found.divergence is not None and theirs[1] is not None
    assert found.logprobs.dtype == found.divergence.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.divergence.double(), theirs[1], rtol=0, atol=1e-5)
    ours = torch.autograd.grad(found.divergence.sum(), [own.states, own.weight])
    wide = [h.detach().double().requires_grad_() for h in (own.states, own.weight)]
    exact = expected(Head(states=wide[0], weight=wide[1]), whole[1], targets, VOCABULARY, 1.0, "reverse_kl")[1]
    assert exact is not None
    for mine, wanted in zip(ours, torch.autograd.grad(exact.sum(), wide), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - wanted).norm() < 0.02 * wanted.norm()


def test_a_second_backward_finds_the_same() -> None:
    own = head(0)
    loss = stream(own, torch.zeros(ROWS, dtype=torch.long), limit=VOCABULARY).logprobs.square().sum()
    first, second = (torch.autograd.grad(loss, [own.states, own.weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def teacher_of(batch: RolloutBatch, part: DivergenceEstimator | None, *, sampled: bool = True) -> TeacherScores:
    needs = ScoreRequest(sampled=sampled) if part is None else ScoreRequest(sampled=sampled) | part.needs
    return local_teacher(toy.model(1).double(), LIMIT).score(batch, needs)


def scored(
    model: PreTrainedModel, batch: RolloutBatch, plan: ScorePlan, head_chunk: int | None, **sides: TeacherScores | None
) -> tuple[StudentScores, list[Tensor | None]]:
    scores = StudentScorer(model, vocab_limit=LIMIT, head_chunk=head_chunk)(batch, plan, **sides)
    grids = (scores.logprobs, scores.divergence, scores.reference_divergence)
    generator = torch.Generator().manual_seed(3)
    loss = torch.stack(
        [(g * torch.rand(g.shape, dtype=WIDE, generator=generator)).sum() for g in grids if g is not None]
    ).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    return scores, list(torch.autograd.grad(loss, trained, allow_unused=True))


@pytest.mark.parametrize("sampled", [True, False], ids=["", "no sampled"])
@pytest.mark.parametrize("part", [None, K1(), K2(), K3(), ForwardKL(), ReverseKL()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["tied", "untied", "frozen head"])
def test_the_scorer_gives_what_its_chunks_give(
    name: str, part: DivergenceEstimator | None, sampled: bool, used: list[str]
) -> None:
    if not sampled and not isinstance(part, ForwardKL | ReverseKL):
        sampled = True
    batch = rollouts()
    teacher = teacher_of(batch, part, sampled=sampled)
    odd = torch.zeros_like(teacher.valid)
    odd[:, 1::2] = True
    teacher = replace(teacher, valid=teacher.valid & odd)
    reference = local_teacher(toy.model(2).double(), LIMIT).score(batch, ScoreRequest(sampled=True))
    plan = ScorePlan(
        sampling_temperature=0.8, distil_temperature=0.8, divergence=part, reference_divergence=K3(), entropy=True
    )
    used.clear()
    sides = {"teacher": teacher, "reference": reference}
    ours, theirs = (scored(HEADS[name]().double(), batch, plan, chunk, **sides) for chunk in (None, 5))
    assert used == ["distillkit.positions"]
    for key in ("logprobs", "distil_logprobs", "divergence", "reference_divergence", "entropy"):
        mine, other = (getattr(scores, key) for scores, _ in (ours, theirs))
        assert (mine is None) == (other is None), key
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
    for scores in (ours[0], theirs[0]):
        assert scores.teacher_logprobs is not None and not scores.teacher_logprobs.requires_grad
    mask = batch.loss_mask & teacher.valid
    torch.testing.assert_close(ours[0].teacher_logprobs[mask], theirs[0].teacher_logprobs[mask], rtol=0, atol=1e-10)  # type: ignore[index]
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_what_a_teacher_could_not_say_reaches_no_gradient(used: list[str]) -> None:
    batch = rollouts()
    teacher = teacher_of(batch, ReverseKL())
    assert teacher.hidden is not None
    valid = teacher.valid.clone()
    valid[0] = False
    hidden = (torch.full_like(teacher.hidden[0], torch.nan), *teacher.hidden[1:])
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=ReverseKL())
    found = scored(toy.model(0).double(), batch, plan, None, teacher=replace(teacher, valid=valid, hidden=hidden))
    assert found[0].divergence is not None and found[0].divergence[0].abs().max() == 0
    assert all(g is not None and bool(g.isfinite().all()) for g in found[1])
    assert "distillkit.positions" in used


class Doubled(ReverseKL):
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        return 2 * super().__call__(student, teacher)


ROW_WISE: dict[str, Callable[[], tuple[PreTrainedModel, ScorePlan]]] = {
    "another divergence": lambda: (toy.model(0), plan_of(JSD())),
    "a subclass with a value of its own": lambda: (toy.model(0), plan_of(Doubled())),
    "two temperatures": lambda: (toy.model(0), replace(plan_of(ReverseKL()), distil_temperature=2.0)),
    "bias": lambda: (HEADS["bias"](), plan_of(ReverseKL())),
    "soft cap": lambda: (HEADS["soft cap"](), plan_of(ReverseKL())),
    "hook": lambda: (HEADS["hook"](), plan_of(ReverseKL())),
}


def plan_of(part: DivergenceEstimator) -> ScorePlan:
    return ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=part)


@pytest.mark.parametrize("case", ROW_WISE)
def test_what_needs_whole_rows_gets_them(case: str, used: list[str]) -> None:
    batch = rollouts()
    model, plan = ROW_WISE[case]()
    assert plan.divergence is not None
    teacher = teacher_of(batch, plan.divergence)
    used.clear()
    ours, theirs = (scored(model.double(), batch, plan, chunk, teacher=teacher)[0] for chunk in (None, WHOLE))
    assert not used
    torch.testing.assert_close(ours.divergence, theirs.divergence, rtol=0, atol=1e-10)


def test_under_autocast_rows_are_whole(used: list[str]) -> None:
    batch, scorer = rollouts(), StudentScorer(toy.model(0), vocab_limit=LIMIT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scorer(batch, plan_of(K2()), None)
    assert not used


@pytest.mark.parametrize("entropy", [True, False])
def test_a_teacher_says_what_its_chunks_say(entropy: bool, used: list[str]) -> None:
    batch = rollouts()
    teacher = local_teacher(toy.model(1).double(), LIMIT)
    request = ScoreRequest(sampled=True, entropy=entropy, temperature=1.3)
    ours = teacher.score(batch, request)
    assert used == ["distillkit.teachers.scoring"]
    teacher.head_chunk = 5
    theirs = teacher.score(batch, request)
    torch.testing.assert_close(ours.sampled, theirs.sampled, rtol=0, atol=1e-10)
    if entropy:
        torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=0, atol=1e-10)
    assert len(used) == 1


@pytest.mark.parametrize("part", [K2(), ReverseKL()], ids=lambda part: type(part).__name__)
def test_no_tensor_is_larger_than_the_weights_or_a_tile(
    part: DivergenceEstimator, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_TILE", 64)
    monkeypatch.setattr(streamed, "_ROWS", 64)
    vocabulary = 4096
    batch = toy.batch([[2, 3, 4], [5, 6]], group_size=8, max_new_tokens=12)
    frozen = local_teacher(toy.model(1, vocabulary=vocabulary), vocabulary)
    with LargestTensor() as seen:
        scores = frozen.score(batch, ScoreRequest(sampled=True) | part.needs)
        output = StudentScorer(toy.model(0, vocabulary=vocabulary), vocab_limit=vocabulary)(
            batch, plan_of(part), scores
        )
        assert output.divergence is not None
        (output.divergence.sum() + output.logprobs.sum()).backward()
    assert used == ["distillkit.teachers.scoring", "distillkit.positions"]
    assert seen.elements == vocabulary * 16
