"""Several teachers as one: by row or averaged in probability, against whole distributions made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from distillkit.components import TeacherScorer
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.topk import TopK
from distillkit.errors import ConfigError, DataError
from distillkit.scorer import ScorePlan
from distillkit.teachers.extrapolated import ExtrapolatedTeacher
from distillkit.teachers.mixture import MixtureTeacher
from distillkit.testing import FakeTeacher, check, rollout_batch, student_info
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores
from tests import toy
from tests.test_scorer import full_logits, local_teacher

V = len(toy.VOCABULARY)
TEMPERATURE = 0.7
WEIGHTS = {"math": 3.0, "code": 1.0}


def wide(seed: int) -> PreTrainedModel:
    """A teacher of another width, with a padded head, in float64."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=V + 3, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double()


class SampledOnly(FakeTeacher):
    """A server that scores the sampled token at temperature 1."""

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True, topk=5)

    @property
    def any_temperature(self) -> bool:
        return False


@pytest.fixture
def batch() -> RolloutBatch:
    found = toy.batch([[2, 3, 4], [5, 6], [7, 8, 9]])
    kinds = ["math" if i % 3 else "code" for i in range(len(found))]
    return replace(found, rows=tuple({"kind": kind} for kind in kinds))


def mixture(**arguments: Any) -> tuple[MixtureTeacher, dict[str, PreTrainedModel]]:
    models = {"math": toy.model(1), "code": wide(2)}
    teachers: dict[str, TeacherScorer] = {name: local_teacher(model) for name, model in models.items()}
    part = MixtureTeacher(teachers=teachers, **arguments)
    part._limit = V
    return part, models


def expected(models: dict[str, PreTrainedModel], batch: RolloutBatch, *, by_row: bool) -> Tensor:
    """Log-probs [M, V] at the loss-mask tokens, from each teacher's own forward."""
    logp = {n: (full_logits(m, batch)[:, :V] / TEMPERATURE).double().log_softmax(-1) for n, m in models.items()}
    if by_row:
        kinds = [batch.rows[i]["kind"] for i, row in enumerate(batch.loss_mask) for _ in range(int(row.sum()))]
        return torch.stack([logp[kind][m] for m, kind in enumerate(kinds)])
    return (0.75 * logp["math"].exp() + 0.25 * logp["code"].exp()).log()


def head_logprobs(scores: TeacherScores) -> Tensor:
    assert scores.hidden is not None and scores.head is not None
    return (scores.head(torch.cat(list(scores.hidden)))[:, :V] / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("arguments", [{"route": "kind"}, {"weights": WEIGHTS}, {"weights": WEIGHTS, "head_chunk": 2}])
def test_scores_are_those_of_the_distribution_put_together_by_hand(
    arguments: dict[str, Any], batch: RolloutBatch
) -> None:
    part, models = mixture(**arguments)
    request = ScoreRequest(sampled=True, topk=4, full=True, entropy=True, temperature=TEMPERATURE)
    scores = part.score(batch, request)
    logp = expected(models, batch, by_row="route" in arguments)
    mask = batch.loss_mask
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    assert scores.sampled is not None and scores.topk is not None and scores.topk_ids is not None
    assert scores.entropy is not None and torch.equal(scores.valid, mask)
    torch.testing.assert_close(scores.sampled[mask], logp.gather(-1, batch.tokens[mask][:, None])[:, 0], **close)
    best = logp.topk(4, dim=-1)
    torch.testing.assert_close(scores.topk[mask], best.values, **close)
    assert torch.equal(scores.topk_ids[mask], best.indices)
    torch.testing.assert_close(scores.entropy[mask], -(logp.exp() * logp).sum(-1), **close)
    torch.testing.assert_close(head_logprobs(scores), logp, **close)
    # The same, asked for one by one.
    alone = part.score(batch, ScoreRequest(sampled=True, temperature=TEMPERATURE))
    assert alone.topk is None and alone.entropy is None and alone.hidden is None
    torch.testing.assert_close(alone.sampled, scores.sampled)


@pytest.mark.parametrize("arguments", [{"route": "kind"}, {"weights": WEIGHTS}])
@pytest.mark.parametrize("divergence", [ReverseKL(), TopK(k=3, chosen_by="student"), TopK(k=3)])
def test_a_divergence_to_the_mixture_in_the_students_pass_does_not_depend_on_the_chunk(
    arguments: dict[str, Any], divergence: Any, batch: RolloutBatch
) -> None:
    part, models = mixture(**arguments)
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=TEMPERATURE, divergence=divergence)
    scores = part.score(batch, replace(divergence.needs, temperature=TEMPERATURE))
    found = [toy.scorer(0, head_chunk=chunk)(batch, plan, scores).divergence for chunk in (None, 2)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    if isinstance(divergence, ReverseKL):
        logp = (full_logits(toy.model(0), batch)[:, :V] / TEMPERATURE).double().log_softmax(-1)
        logq = expected(models, batch, by_row="route" in arguments)
        by_hand = (logp.exp() * (logp - logq)).sum(-1)
        torch.testing.assert_close(found[0][batch.loss_mask].double(), by_hand, atol=1e-5, rtol=1e-5)


def test_selected_rollouts_keep_their_own_teacher(batch: RolloutBatch) -> None:
    part, _ = mixture(route="kind")
    request = ScoreRequest(full=True, temperature=TEMPERATURE)
    whole = part.score(batch, request)
    index = torch.tensor([7, 3, 4, 0])
    few = part.score(batch.select(index), request)
    cut = whole.select(index, int(batch.lengths[index].max()))
    torch.testing.assert_close(head_logprobs(cut), head_logprobs(few), atol=1e-5, rtol=1e-5)


def test_equal_weights_are_the_default_and_one_teacher_is_itself(batch: RolloutBatch) -> None:
    request = ScoreRequest(sampled=True, temperature=TEMPERATURE)
    default, models = mixture()
    equal, _ = mixture(weights={"code": 5.0, "math": 5.0})
    torch.testing.assert_close(default.score(batch, request).sampled, equal.score(batch, request).sampled)
    alone = MixtureTeacher(teachers={"math": local_teacher(models["math"])})
    ours, theirs = alone.score(batch, request).sampled, local_teacher(models["math"]).score(batch, request).sampled
    torch.testing.assert_close(ours, theirs)


def test_a_token_counts_where_every_teacher_can_score_it() -> None:
    rollouts = rollout_batch()
    part = MixtureTeacher(teachers={"a": FakeTeacher(blind_to="2"), "b": FakeTeacher(blind_to="9")})
    part.setup(student_info())
    scores = part.score(rollouts, ScoreRequest(sampled=True))
    blind = FakeTeacher(blind_to="29").score(rollouts, ScoreRequest(sampled=True)).valid
    assert torch.equal(scores.valid, blind) and not torch.equal(blind, rollouts.loss_mask)


def test_what_is_offered_follows_from_the_teachers() -> None:
    server, local = SampledOnly(), FakeTeacher()
    average = MixtureTeacher(teachers={"a": server, "b": local})
    assert average.offers == ScoreRequest(sampled=True) and not average.any_temperature
    routed = MixtureTeacher(teachers={"a": server, "b": local}, route="kind")
    assert routed.offers == ScoreRequest(sampled=True, topk=5)
    whole = MixtureTeacher(teachers={"a": local, "b": FakeTeacher()})
    assert whole.offers.full and whole.offers.entropy and whole.offers.topk >= 99 and whole.any_temperature
    assert not ExtrapolatedTeacher(teacher=server, base=local).any_temperature


@pytest.mark.parametrize("weights", [None, {"a": 0.2, "b": 0.8}])
def test_conformance_averaged(weights: dict[str, float] | None) -> None:
    other = FakeTeacher(logits=tuple(float(i % 7) for i in range(99)))
    check(MixtureTeacher(teachers={"a": FakeTeacher(), "b": other}, weights=weights, head_chunk=4))


def test_conformance_routed() -> None:
    other = FakeTeacher(logits=tuple(float(i % 7) for i in range(99)))
    rows = [{"domain": domain} for domain in ("a", "b", "a")]
    part = MixtureTeacher(teachers={"a": FakeTeacher(), "b": other}, route="domain")
    check(part, rollouts=rollout_batch(rows=rows, observation="#"))


def test_the_identity_says_how_and_of_whom() -> None:
    teachers: dict[str, TeacherScorer] = {"a": FakeTeacher(), "b": FakeTeacher(blind_to="2")}
    made = [
        MixtureTeacher(teachers=teachers),
        MixtureTeacher(teachers=teachers, weights={"a": 1.0, "b": 2.0}),
        MixtureTeacher(teachers=teachers, route="kind"),
        MixtureTeacher(teachers=dict(reversed(teachers.items())), route="kind"),
    ]
    assert len({part.identity() for part in made[:3]}) == 3
    same = MixtureTeacher(teachers=teachers, weights={"a": 2.0, "b": 4.0})
    assert same.identity() == made[1].identity()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"teachers": {}}, "model.teacher.teachers\n    got:      {}"),
        ({"route": "kind", "weights": {"a": 1.0, "b": 1.0}}, "model.teacher: both route and weights are given"),
        ({"weights": {"a": 1.0}}, "not those of the teachers\n    got:      a\n    expected: one for each of a, b"),
        ({"weights": {"a": 1.0, "b": 0.0}}, "model.teacher.weights.b\n    got:      0.0"),
        ({"weights": {"a": 1.0, "b": float("inf")}}, "model.teacher.weights.b\n    got:      inf"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MixtureTeacher(**({"teachers": {"a": FakeTeacher(), "b": FakeTeacher()}} | arguments))
    assert text in str(caught.value)


def test_a_row_without_a_teacher_is_named() -> None:
    part = MixtureTeacher(teachers={"a": FakeTeacher(), "b": FakeTeacher()}, route="domain")
    rows = [{"domain": "a"}, {"domain": "c"}, {"domian": "a"}]
    assert part.check_rows(rows) == [
        (1, "domain: 'c'"),
        (2, "no column 'domain', only domian; did you mean 'domian'?"),
    ]
    with pytest.raises(DataError) as caught:
        part.score(rollout_batch(rows=rows), ScoreRequest(sampled=True))
    assert str(caught.value) == (
        "model.teacher.route: no teacher for the prompt '2+2+1='\n    got:      domain: 'c'\n    expected: a, b"
    )
    inside = ExtrapolatedTeacher(teacher=part, base=FakeTeacher())
    assert [i for i, _ in inside.check_rows(rows)] == [1, 2]
