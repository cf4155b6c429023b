"""How many [positions, V] arrays the head and a divergence hold at once, counted by running them on a small scale."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distillkit.backbone import LMHead
from distillkit.buffers import keep_freed_pages
from distillkit.chunks import block_rows
from distillkit.components import DivergenceEstimator
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, SamplingSettings, TeacherScores

__all__ = ["HeadArrays", "head_arrays", "start_profiler"]

_VOCABULARY, _WIDTH = 2**14, 4


@dataclass(frozen=True, kw_only=True)
class HeadArrays:
    """float32 arrays [positions, V] alive at once: `chunk` of the size of a head chunk, `block` of a block of rows."""

    chunk: float
    block: float


os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler prints to stderr at every start


def start_profiler() -> None:
    """Start torch's profiler once; call it in the main thread where `head_arrays` will run in another."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass


def head_arrays(plan: ScorePlan, *, autocast: bool) -> HeadArrays:
    """Return the most arrays alive in forward and backward of a head that is a matrix, scored in several chunks.

    Log-probs alone take one chunk and a few blocks; a divergence over the whole vocabulary another chunk and more
    blocks. Hidden states and the head's gradient are not among them.

    Args:
        plan: temperatures and divergences of the step.
        autocast: run the head in bfloat16, as `trainer.precision: bf16-mixed` does.
    """
    keep_freed_pages()  # not inside the first count
    rows, times = block_rows(_VOCABULARY, "cpu"), 4
    one = _most(plan, rows, autocast=autocast)
    several = _most(plan, times * rows, autocast=autocast)
    array = 4 * rows * _VOCABULARY
    chunk = (several - one) / (times - 1) / array
    return HeadArrays(chunk=chunk, block=one / array - chunk)


def _most(plan: ScorePlan, rows: int, *, autocast: bool) -> int:
    """The most bytes alive while two chunks of `rows` positions are scored."""
    with torch.random.fork_rng(devices=[]):
        model, other = _model(rows), _model(rows)
    batch = _batch(2 * rows)
    teacher, reference = (_scores(batch, other, d) for d in (plan.divergence, plan.reference_divergence))
    scorer = StudentScorer(model, vocab_limit=_VOCABULARY, head_chunk=rows)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores = scorer(batch, plan, teacher, reference)
        values = (scores.logprobs, scores.distil_logprobs, scores.divergence, scores.reference_divergence)
        loss = sum(value.sum() for value in values if value is not None)
        del scores, values
        assert isinstance(loss, Tensor)
        loss.backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most - 4 * _VOCABULARY * _WIDTH


def _model(rows: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_WIDTH, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=_WIDTH, tie_word_embeddings=False,
        max_position_embeddings=4 * rows,
    )  # fmt: skip
    model: nn.Module = Qwen3ForCausalLM(config).eval()
    return model


def _batch(tokens: int) -> RolloutBatch:
    """One rollout with a completion of so many tokens."""
    shape = (1, tokens + 1)
    trained = torch.ones(shape, dtype=torch.bool)
    trained[:, 0] = False
    return RolloutBatch(
        tokens=torch.arange(shape[1]).reshape(shape),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        loss_mask=trained,
        behaviour_logprobs=torch.zeros(shape),
        policy_version=torch.zeros(shape, dtype=torch.long),
        prompt_lengths=torch.ones(1, dtype=torch.long),
        group_id=torch.zeros(1, dtype=torch.long),
        finish_reason=("length",),
        texts=("",),
        prompts=("",),
        rows=({},),
        settings=SamplingSettings(group_size=1, max_new_tokens=tokens),
    )


@torch.no_grad()
def _scores(batch: RolloutBatch, model: nn.Module, divergence: DivergenceEstimator | None) -> TeacherScores | None:
    if divergence is None:
        return None
    needs = replace(divergence.needs, sampled=True)
    shape, k = batch.tokens.shape, min(needs.topk, _VOCABULARY)
    hidden = None
    if needs.needs_distribution:
        tokens = int(batch.loss_mask.sum())
        hidden = (torch.randn(tokens, _WIDTH, generator=torch.Generator().manual_seed(0)),)
    return TeacherScores(
        valid=batch.loss_mask,
        sampled=torch.zeros(shape),
        topk_ids=torch.zeros(*shape, k, dtype=torch.long) if k else None,
        topk=torch.full((*shape, k), -10.0) if k else None,
        entropy=None,
        hidden=hidden,
        head=None if hidden is None else LMHead(model),
    )
