"""What `hf` refuses, and the whole text of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Lfm2Config,
    MambaConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
)

from distillkit.errors import ConfigError, ModelError, RolloutError
from distillkit.samplers.hf import HFSampler
from tests.samplers.tiny import info, requests, sampler, student

MAMBA = """\
model.sampler: the hf sampler cannot decode with this student's cache
    got:      MambaForCausalLM, whose cache has layers of class LinearAttentionLayer
    expected: a decoder whose every layer keeps keys and values, with full or sliding-window attention (Llama, Qwen2, \
Qwen3, Mistral, Gemma 2, Gemma 3, Phi-3 and the like)
    try:      another model.student, or model.sampler: replay with completions that were sampled elsewhere"""

UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "mamba": (MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4), MAMBA),
    "linear attention": (
        Qwen3NextConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        "Qwen3NextForCausalLM, whose cache has layers of class LinearAttentionLayer",
    ),
    "convolution": (
        Lfm2Config(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
        ),
        "Lfm2ForCausalLM, whose cache has layers of class LinearAttentionLayer",
    ),
    "own state": (
        RwkvConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, context_length=16),
        "RwkvForCausalLM, which keeps a recurrent state of its own instead of a DynamicCache",
    ),
    "recurrent gemma": (
        RecurrentGemmaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            lru_width=16,
        ),
        "RecurrentGemmaForCausalLM, ",
    ),
    "encoder-decoder": (
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        "T5ForConditionalGeneration is an encoder-decoder model (EncoderDecoderCache)",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_cache_is_refused_by_name_before_decoding(name: str) -> None:
    config, expected = UNSUPPORTED[name]
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    model.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    refused = HFSampler()
    refused.setup(info())
    with pytest.raises(ModelError) as error:
        refused.sync(SimpleNamespace(model=model))
    assert str(error.value) == expected if name == "mamba" else expected in str(error.value)
    assert error.value.exit_code == 2


def test_a_model_that_ignores_the_cache_is_refused() -> None:
    model = student("llama")
    whole = model.forward

    def forgetful(input_ids: Any, attention_mask: Any, past_key_values: Any = None, use_cache: bool = False) -> Any:
        return whole(input_ids, attention_mask, use_cache=False)

    model.forward = forgetful
    with pytest.raises(ModelError) as error:
        list(sampler(model).sample(requests([4])))
    assert str(error.value) == (
        "model.sampler: the model did not fill the cache it was given\n"
        "    got:      0 tokens in DynamicCache after a prompt of 4"
    )


def test_requests_of_different_settings_are_refused() -> None:
    one, two = requests([3, 4])
    two = replace(two, settings=replace(two.settings, temperature=0.5))
    with pytest.raises(RolloutError) as error:
        sampler(student("llama")).sample([one, two])
    assert str(error.value) == (
        "HFSampler.sample: request 1 (group 51) has other sampling settings than request 0\n"
        "    got:      SamplingSettings(group_size=1, max_new_tokens=12, temperature=0.5, top_p=1.0)\n"
        "    expected: SamplingSettings(group_size=1, max_new_tokens=12, temperature=0.0, top_p=1.0)\n"
        "    try:      one call per kind of settings"
    )


def test_an_empty_prompt_is_refused() -> None:
    (one,) = requests([3])
    with pytest.raises(RolloutError) as error:
        sampler(student("llama")).sample([replace(one, prompt_ids=())])
    assert str(error.value) == (
        "HFSampler.sample: request 0 (group 50) has an empty prompt\n    expected: at least one token"
    )


def test_a_prompt_beyond_a_learned_table_of_positions_is_refused() -> None:
    model = student("gpt2")
    assert len(list(sampler(model).sample(requests([116])))) == 1
    with pytest.raises(RolloutError) as error:
        sampler(model).sample(requests([117]))
    assert str(error.value) == (
        "HFSampler.sample: request 0 (group 50) does not fit the model's table of positions\n"
        "    got:      117 prompt tokens + 12 new ones = 129\n"
        "    expected: at most 128 (max_position_embeddings)\n"
        "    try:      a smaller model.sampler.max_new_tokens, or drop prompts this long"
    )
    # Rotary positions have no table.
    assert len(list(sampler(student("llama", max_position_embeddings=8)).sample(requests([9])))) == 1


def test_sampling_before_the_student_is_there_is_refused() -> None:
    with pytest.raises(RolloutError) as error:
        HFSampler().sample(requests([3]))
    assert str(error.value) == (
        "HFSampler.sample\n    got:      no student yet\n    expected: setup(info) and sync(student) before it"
    )


def test_diverged_weights_are_reported() -> None:
    model = student("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(RolloutError) as error:
            list(sampler(model).sample(requests([3], max_new_tokens=2, temperature=temperature)))
        assert str(error.value) == (
            "model.sampler: the student's log-probs are not finite (group 50)\n"
            "    got:      [nan, nan] in rollout 0\n"
            "    try:      the weights have diverged: start again from an earlier checkpoint with a lower learning rate"
        )
    assert model.training


def test_out_of_memory_names_the_setting() -> None:
    model = student("llama")

    def fail(module: nn.Module, args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RolloutError) as error:
        list(sampler(model, rows_per_batch=64).sample(requests([3])))
    assert str(error.value) == (
        "model.sampler: out of memory while decoding\n"
        "    got:      64 rows of up to 12 new tokens\n"
        "    try:      a smaller model.sampler.rows_per_batch"
    )


def test_rows_per_batch_is_checked() -> None:
    with pytest.raises(ConfigError) as error:
        HFSampler(rows_per_batch=0)
    assert str(error.value) == "model.sampler.rows_per_batch\n    got:      0\n    expected: at least 1"
