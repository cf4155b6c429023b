"""How many [positions, V] arrays a divergence holds at once, counted by running it on a small vocabulary."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distillkit.components import DivergenceEstimator
from distillkit.models import LMHead, ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, SamplingSettings, TeacherScores

__all__ = ["head_arrays", "start_profiler"]

_ROWS, _VOCABULARY, _WIDTH = 64, 4096, 4


os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler prints to stderr at every start


def start_profiler() -> None:
    """Start torch's profiler once; call it in the main thread where `head_arrays` will run in another."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass


def head_arrays(plan: ScorePlan, *, autocast: bool) -> float:
    """Return the largest number of float32 [positions, V] arrays alive in forward and backward of one head chunk.

    Log-probs alone take about four; a divergence over the whole vocabulary ten or more. Hidden states and the head's
    gradient are not among them.

    Args:
        plan: temperatures and divergences of the step.
        autocast: run the head in bfloat16, as `trainer.precision: bf16-mixed` does.
    """
    with torch.random.fork_rng(devices=[]):
        model, other = _model(), _model()
    batch = _batch()
    teacher, reference = (_scores(batch, other, d) for d in (plan.divergence, plan.reference_divergence))
    scorer = StudentScorer(model, vocab_limit=_VOCABULARY, head_chunk=_ROWS)
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
    return (most - 2 * 4 * _VOCABULARY * _WIDTH) / (4 * _ROWS * _VOCABULARY)


def _model() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_WIDTH, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=_WIDTH, tie_word_embeddings=False,
        max_position_embeddings=4 * _ROWS,
    )  # fmt: skip
    model: nn.Module = Qwen3ForCausalLM(config).eval()
    return model


def _batch() -> RolloutBatch:
    """One rollout whose completion fills two chunks, so that each is recomputed in the backward pass."""
    shape = (1, 2 * _ROWS + 1)
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
        settings=SamplingSettings(group_size=1, max_new_tokens=2 * _ROWS),
    )


@torch.no_grad()
def _scores(batch: RolloutBatch, model: nn.Module, divergence: DivergenceEstimator | None) -> TeacherScores | None:
    if divergence is None:
        return None
    needs = replace(divergence.needs, sampled=True)
    shape, k = batch.tokens.shape, min(needs.topk, _VOCABULARY)
    hidden = None
    if needs.needs_distribution:
        hidden = (torch.randn(2 * _ROWS, _WIDTH, generator=torch.Generator().manual_seed(0)),)
    return TeacherScores(
        valid=batch.loss_mask,
        sampled=torch.zeros(shape),
        topk_ids=torch.zeros(*shape, k, dtype=torch.long) if k else None,
        topk=torch.full((*shape, k), -10.0) if k else None,
        entropy=None,
        hidden=hidden,
        head=None if hidden is None else LMHead(model),
    )
