"""Rollouts as one packed row: the same states, scores and gradients as padded ones, from fewer tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from distillkit.backbone import LMHead, available, predicting_states, token_batches
from distillkit.divergences.full import ReverseKL
from distillkit.models import enable_gradient_checkpointing
from distillkit.packed import PackedRow, enable_packing, packed_states, packs
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.teachers.scoring import score_rollouts
from distillkit.types import Rollout, RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings, ScoreRequest
from tests import toy

SMALL: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip

FAMILIES = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "llama": LlamaConfig(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "phi3": Phi3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}
OTHERS = {
    "mistral, sliding windows": MistralConfig(**SMALL, sliding_window=4),
    "gemma2, soft-capped scores": Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "eager attention": LlamaConfig(**SMALL, attn_implementation="eager"),
}


def model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return made.eval()


def batch(groups: list[tuple[list[int], list[list[int]]]]) -> RolloutBatch:
    """Rollouts of given prompts and completions."""
    return RolloutBatch.from_groups(
        [
            RolloutGroup(
                request=SampleRequest(
                    prompt_ids=tuple(prompt), prompt="", row={}, group_id=10 + g, seed=0, policy_version=0,
                    settings=SamplingSettings(group_size=len(completions), max_new_tokens=9),
                ),
                rollouts=tuple(
                    Rollout(
                        completion_ids=torch.tensor(ids), behaviour_logprobs=torch.zeros(len(ids)),
                        loss_mask=torch.tensor([i != 1 for i in range(len(ids))]),
                        policy_version=torch.zeros(len(ids), dtype=torch.long), finish_reason="stop", text="",
                    )
                    for ids in completions
                ),
            )
            for g, (prompt, completions) in enumerate(groups)
        ],
        pad_id=0,
    )  # fmt: skip


GROUPS = [([3, 4, 5], [[6, 7, 8, 9], [6], [2, 2, 3]]), ([9, 8], [[5, 4, 3, 2, 1, 0]]), ([3, 4, 5], [[4, 4]])]
"""Every completion's second token is no training token; the third group's prompt is the first's."""


@pytest.mark.parametrize("config", FAMILIES.values(), ids=list(FAMILIES))
def test_states_and_gradients_are_those_of_padded_rows(config: Any) -> None:
    ours, rollouts = model(config), batch(GROUPS)
    assert enable_packing(ours)
    grads = []
    states = []
    for packed in (False, True):
        ours.zero_grad()
        found = predicting_states(ours, rollouts, packed=packed)
        weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
        (found * weight).sum().backward()
        states.append(found.detach())
        grads.append(torch.cat([p.grad.flatten() for p in ours.base_model.parameters() if p.grad is not None]))
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)
    assert (grads[1] - grads[0]).norm() < 1e-5 * grads[0].norm()


@pytest.mark.parametrize("config", OTHERS.values(), ids=list(OTHERS))
def test_a_model_that_cannot_is_left_as_it_was_and_runs_padded(config: Any) -> None:
    theirs = model(config)
    before = theirs.config._attn_implementation
    assert not enable_packing(theirs)
    assert theirs.config._attn_implementation == before
    assert not packs(theirs)
    assert available("packed", theirs) == "sorted"
    assert available("in_order", theirs) == "in_order"


def test_a_model_that_ignores_the_branches_is_found_out() -> None:
    """Learned positions are fine, a backbone that drops the argument is not: the states differ."""

    class Deaf(torch.nn.Module):
        def __init__(self, backbone: torch.nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, packed_branches: Any = None, **given: Any) -> Any:
            return self.backbone(**given)

    deaf = model(FAMILIES["llama"])
    deaf.model = Deaf(deaf.model)
    assert not enable_packing(deaf)


def test_learned_positions_restart_with_every_completion() -> None:
    gpt2 = model(GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5))
    rollouts = batch(GROUPS)
    assert enable_packing(gpt2)
    got, want = (predicting_states(gpt2.eval(), rollouts, packed=packed) for packed in (True, False))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_row_holds_each_prompt_once_and_nothing_else() -> None:
    rollouts = batch(GROUPS)
    row = PackedRow.of(rollouts.tokens, rollouts.prompt_lengths, rollouts.lengths)
    tokens = rollouts.tokens.flatten()[row.source].tolist()
    assert tokens == [3, 4, 5, 6, 7, 8, 9, 6, 2, 2, 3, 4, 4, 9, 8, 5, 4, 3, 2, 1, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 3, 4, 5, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert row.branches.causal == ((0, 3), (3, 7), (7, 8), (8, 11), (11, 13), (13, 15), (15, 21))
    assert row.branches.shared == ((3, 13, 0, 3), (15, 21, 13, 15))
    real = rollouts.attention_mask
    assert torch.equal(rollouts.tokens.flatten()[row.source][row.place][real], rollouts.tokens[real])


def test_no_mask_of_the_rows_length_squared_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.masking_utils

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a mask was built")

    ours, rollouts = toy.model(), batch(GROUPS)
    row = PackedRow.of(rollouts.tokens, rollouts.prompt_lengths, rollouts.lengths)
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", refuse)
    monkeypatch.setitem(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "distillkit", refuse)
    assert packed_states(ours.base_model, rollouts.tokens, row).shape == (21, 16)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head_chunk", [None, 3])
def test_scores_and_gradients_of_the_student(checkpointing: bool, head_chunk: int | None) -> None:
    rollouts = batch(GROUPS)
    teacher_model = toy.model(1)
    found = []
    for packed in (False, True):
        student = toy.model(0)
        if checkpointing:
            enable_gradient_checkpointing(student)
            student.train()
        scorer = StudentScorer(student, vocab_limit=len(toy.VOCABULARY), head_chunk=head_chunk)
        teacher = score_rollouts(
            teacher_model, LMHead(teacher_model), rollouts, ScoreRequest(sampled=True, full=True),
            vocab_limit=len(toy.VOCABULARY), tokens_per_batch=12, batching="packed" if packed else "sorted",
            head_chunk=head_chunk,
        )  # fmt: skip
        plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=ReverseKL(), packed=packed)
        scores = scorer(rollouts, plan, teacher)
        (scores.logprobs.sum() + scores.divergence.square().sum()).backward()
        grad = torch.cat([p.grad.flatten() for p in student.parameters()])
        found.append((scores.logprobs.detach(), scores.divergence.detach(), teacher.sampled, grad))
    for plain, packed_ in zip(*found, strict=True):
        torch.testing.assert_close(packed_, plain, rtol=1e-4, atol=1e-5)


def test_autocast_runs_the_attention_in_low_precision() -> None:
    ours, rollouts = toy.model(), batch(GROUPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = predicting_states(ours, rollouts, packed=True)
        padded = predicting_states(ours, rollouts)
    whole = predicting_states(ours, rollouts, packed=True)
    assert (low.float() - whole).norm() < 2 * (padded.float() - whole).norm() + 1e-3


def test_groups_go_together_in_a_token_budget() -> None:
    rollouts = batch(GROUPS)
    assert token_batches(rollouts, 100, "packed") == [[0, 1, 2, 3, 4]]
    assert token_batches(rollouts, 13, "packed") == [[0, 1, 2], [3, 4]]
    assert token_batches(rollouts, 8, "packed") == [[0, 1], [2], [3], [4]]
    assert token_batches(rollouts, 14, "in_order") == [[0, 1], [2], [3], [4]]
