"""The chunked head against plain autograd over whole logits: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from distillkit import chunks, registry
from distillkit.backbone import LMHead, predicting_states
from distillkit.components import DivergenceEstimator
from distillkit.lora import LoraSettings, apply_lora
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores, TokenScores
from tests import toy
from tests.test_scorer import local_teacher

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]
SAMPLING, DISTIL = 0.8, 1.7
LIMIT = len(toy.VOCABULARY) - 2
WHOLE = 10**6
DIVERGENCES = [entry.name for entry in registry.entries("divergence")]


def rollouts() -> RolloutBatch:
    """Without the ids that take part in no softmax."""
    batch = toy.batch(PROMPTS)
    return replace(batch, tokens=batch.tokens.masked_fill(batch.tokens >= LIMIT, 2))


def divergence(name: str) -> DivergenceEstimator:
    part: DivergenceEstimator = registry.load(registry.find("divergence", name))()
    return part


def with_bias() -> PreTrainedModel:
    model = toy.model(0, tied=False)
    head = nn.Linear(16, len(toy.VOCABULARY))
    model.set_output_embeddings(head)
    return model


def with_soft_cap() -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(toy.VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.5, pad_token_id=0,
            eos_token_id=1, bos_token_id=2, final_logit_softcapping=3.0,
        )
    )  # fmt: skip


def with_adapter(*targets: str) -> PreTrainedModel:
    model = apply_lora(toy.model(0, tied=False), LoraSettings(rank=4, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else 0, and of no effect
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


def with_hook() -> PreTrainedModel:
    model = toy.model(0)
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 1.5)
    return model


HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": lambda: toy.model(0),
    "untied": lambda: toy.model(0, tied=False),
    "bias": with_bias,
    "soft cap": with_soft_cap,
    "adapter on the head": lambda: with_adapter("lm_head", "q_proj"),
    "frozen head": lambda: with_adapter("q_proj"),
    "hook": with_hook,
}


def plain(
    model: nn.Module, batch: RolloutBatch, teacher: TeacherScores, part: DivergenceEstimator
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs at both temperatures and the divergence [M], in one piece and by autograd alone."""
    mask = batch.loss_mask
    head = LMHead(model)
    logits = head(predicting_states(model, batch))[:, :LIMIT]
    targets = batch.tokens[mask][:, None]
    logprobs, distil = ((logits / t).log_softmax(-1) for t in (SAMPLING, DISTIL))
    needs, own, other = part.needs, {}, {}
    if needs.needs_distribution:
        assert teacher.hidden is not None and teacher.head is not None
        with torch.no_grad():
            other_logits = teacher.head(torch.cat(list(teacher.hidden)))[:, :LIMIT] / DISTIL
    if needs.sampled:
        own["sampled"], other["sampled"] = distil.gather(-1, targets).squeeze(-1), teacher.sampled[mask]
    if needs.student_topk:
        ids = distil.topk(needs.student_topk, dim=-1).indices
        own["topk"], other["topk"] = distil.gather(-1, ids), other_logits.log_softmax(-1).gather(-1, ids)
    elif needs.topk:
        own["topk"], other["topk"] = distil.gather(-1, teacher.topk_ids[mask]), teacher.topk[mask]
    if needs.full:
        own["logits"], other["logits"] = logits / DISTIL, other_logits
    value = part(TokenScores(**own), TokenScores(**other))
    return logprobs.gather(-1, targets).squeeze(-1), distil.gather(-1, targets).squeeze(-1), value


def check(model: PreTrainedModel, part: DivergenceEstimator, head_chunk: int | None) -> None:
    batch, model = rollouts(), model.double().eval()
    frozen = local_teacher(toy.model(1).double(), LIMIT)
    frozen.head_chunk = head_chunk
    wanted = {**vars(ScoreRequest(sampled=True) | part.needs), "temperature": DISTIL}
    teacher = frozen.score(batch, ScoreRequest(**wanted))
    plan = ScorePlan(sampling_temperature=SAMPLING, distil_temperature=DISTIL, divergence=part)
    scores = StudentScorer(model, vocab_limit=LIMIT, head_chunk=head_chunk)(batch, plan, teacher)
    mask = batch.loss_mask
    ours = [grid[mask] for grid in (scores.logprobs, scores.distil_logprobs, scores.divergence) if grid is not None]
    theirs = plain(model, batch, teacher, part)
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(len(column), dtype=torch.float64, generator=generator) for column in theirs]
    for weighed in (weights, [weights[0] * 0, weights[1] * 0, weights[2]]):
        found, expected = (
            torch.autograd.grad(
                sum(c @ w for c, w in zip(side, weighed, strict=True)), trained, retain_graph=True, allow_unused=True
            )
            for side in (ours, theirs)
        )
        for own, other in zip(found, expected, strict=True):
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
        assert any(g is not None and g.abs().max() > 1e-3 for g in found)
    for own_column, column in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own_column, column, rtol=0, atol=1e-10)


@pytest.fixture(params=[40, 2**20], ids=["blocks of 2 rows", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks._BLOCK_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("head_chunk", [1, 7, None, WHOLE])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_has_the_values_and_gradients_of_whole_logits(name: str, head_chunk: int | None) -> None:
    check(toy.model(0), divergence(name), head_chunk)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("head_chunk", [1, 7, None, WHOLE])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_the_values_and_gradients_of_whole_logits(head: str, head_chunk: int | None) -> None:
    check(HEADS[head](), divergence("reverse_kl"), head_chunk)


def test_only_a_head_that_is_a_matrix_is_taken_for_one() -> None:
    plain_heads = {name for name, make in HEADS.items() if LMHead(make()).matrix() is not None}
    assert plain_heads == {"tied", "untied", "bias", "soft cap", "frozen head"}


@pytest.mark.parametrize("head", ["tied", "hook"])
def test_a_second_backward_finds_the_logits_as_the_first(head: str) -> None:
    batch, model = rollouts(), HEADS[head]()
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0)
    for head_chunk in (4, WHOLE):
        loss = StudentScorer(model, vocab_limit=LIMIT, head_chunk=head_chunk)(batch, plan).logprobs.square().sum()
        first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("head", ["tied", "hook"])
def test_a_recomputed_chunk_is_not_scored_again_before_its_gradient(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, scored = rollouts(), []
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0)
    score = chunks._Job.score
    monkeypatch.setattr(chunks._Job, "score", lambda job, *more: scored.append(more[1]) or score(job, *more))
    loss = StudentScorer(HEADS[head](), vocab_limit=LIMIT, head_chunk=4)(batch, plan).logprobs.sum()
    once = len(scored)
    loss.backward()
    assert once == len(scored) == -(-int(batch.loss_mask.sum()) // 4)


@pytest.mark.parametrize("head", ["tied", "hook"])
def test_autocast_holds_in_the_backward_pass_too(head: str) -> None:
    batch = rollouts()
    part = divergence("reverse_kl")
    teacher = local_teacher(toy.model(1), LIMIT).score(batch, ScoreRequest(full=True))
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=part)
    found = []
    for head_chunk in (4, WHOLE):
        model = HEADS[head]()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = StudentScorer(model, vocab_limit=LIMIT, head_chunk=head_chunk)(batch, plan, teacher)
        assert scores.divergence is not None
        found.append(torch.autograd.grad(scores.divergence.sum(), list(model.parameters())))
        assert all(g.dtype == torch.float32 for g in found[-1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * float(other.abs().max()))
