"""Adapters beside the student's weights: what learns, what is scored, sampled, exported and refused."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from distillkit.errors import ConfigError, ModelError
from distillkit.lora import LoraSettings, adapter_state, apply_lora, merged_state_dict
from distillkit.models import enable_gradient_checkpointing
from distillkit.samplers.hf import HFSampler
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.training.checkpoints import export_student
from distillkit.types import RolloutBatch
from tests import toy

PLAN = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0)


def adapted(settings: LoraSettings, *, tied: bool = False, trained: bool = True, seed: int = 0) -> Any:
    """A toy model with adapters whose B is no longer zero."""
    model = apply_lora(toy.model(0, tied=tied), settings, seed=seed)
    if trained:
        torch.manual_seed(9)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
    return model


def student(model: torch.nn.Module, head_chunk: int | None = None) -> StudentScorer:
    return StudentScorer(model, vocab_limit=len(toy.VOCABULARY), head_chunk=head_chunk)


def logprobs(model: torch.nn.Module, batch: RolloutBatch, head_chunk: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        scored: torch.Tensor = student(model, head_chunk)(batch, PLAN).logprobs
    return scored


@pytest.fixture
def batch() -> RolloutBatch:
    return toy.batch([[3, 4], [5, 6, 7]])


TARGETS: list[Any] = [None, "all-linear", ["q_proj", "v_proj"], ["down_proj", "lm_head"]]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_changes_nothing_until_it_learns_and_the_merged_model_then_computes_the_same(
    targets: Any, rslora: bool, batch: RolloutBatch, tmp_path: Path
) -> None:
    settings = LoraSettings(rank=4, target_modules=targets, rslora=rslora)
    plain = toy.model(0, tied=False)
    torch.testing.assert_close(logprobs(adapted(settings, trained=False), batch), logprobs(plain, batch))

    model = adapted(settings)
    before = copy.deepcopy(model.state_dict())
    gap = (logprobs(model, batch) - logprobs(plain, batch)).abs().max()
    assert gap > 0.1
    merged = toy.model(1, tied=False)
    merged.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logprobs(merged, batch), logprobs(model, batch), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_agrees_with_peft_on_transposed_weights_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = apply_lora(GPT2LMHeadModel(config), LoraSettings(rank=4, target_modules=["c_attn", "c_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    ours = merged_state_dict(model)
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()  # type: ignore[operator]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-6)


def test_gathered_weights_are_merged_without_reading_the_model() -> None:
    model = adapted(LoraSettings(rank=4))
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    expected = merged_state_dict(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    found = merged_state_dict(model, whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_a_plain_checkpoint_with_the_adapter_beside_it(
    tied: bool, batch: RolloutBatch, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = adapted(LoraSettings(rank=4, target_modules="all-linear"), tied=tied)
    export_student(model, toy.tokenizer(), tmp_path / "student")
    files = [*(tmp_path / "student").iterdir(), *(tmp_path / "adapter").iterdir()]
    assert len(files) > 4 and {file.stat().st_mode & 0o777 for file in files} == {0o644}, "others may read them"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not (tmp_path / "student" / "adapter_config.json").exists()
    assert plain.config.tie_word_embeddings is tied
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(logprobs(plain, batch), logprobs(model, batch), atol=1e-5, rtol=1e-5)

    again: Any = PeftModel.from_pretrained(toy.model(0, tied=tied), str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(again, batch), logprobs(model, batch))


def test_bfloat16_weights_stay_and_their_adapters_are_float32(batch: RolloutBatch) -> None:
    base = toy.model(0).to(torch.bfloat16)
    model = apply_lora(base, LoraSettings(rank=4))
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    merged = merged_state_dict(model)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], value) for name, value in toy.model(0).to(torch.bfloat16).state_dict().items())


def gradients(model: torch.nn.Module, batch: RolloutBatch, head_chunk: int | None) -> dict[str, torch.Tensor]:
    scores = student(model, head_chunk)(batch, PLAN)
    (scores.logprobs * torch.arange(scores.logprobs.numel()).reshape(scores.logprobs.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]], ids=str)
def test_chunks_and_gradient_checkpointing_give_the_same_gradient_and_only_adapters_have_one(
    targets: Any, batch: RolloutBatch
) -> None:
    settings = LoraSettings(rank=4, target_modules=targets)
    whole = gradients(adapted(settings), batch, None)
    assert whole and all(".lora_" in name for name in whole)
    assert all(float(g.norm()) > 0 for g in whole.values())
    checkpointed = adapted(settings).train()
    enable_gradient_checkpointing(checkpointed)
    for other in (gradients(adapted(settings), batch, 3), gradients(checkpointed, batch, 3)):
        assert other.keys() == whole.keys()
        for name, gradient in whole.items():
            assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_sampler_decodes_with_the_adapters() -> None:
    model = adapted(LoraSettings(rank=4, target_modules=["q_proj", "down_proj", "lm_head"]))
    plain = toy.model(0, tied=False)
    merged = toy.model(1, tied=False)
    merged.load_state_dict(merged_state_dict(model))

    def sampled(network: PreTrainedModel) -> RolloutBatch:
        sampler = HFSampler(group_size=4, max_new_tokens=8)
        sampler.setup(toy.info())
        sampler.sync(student(network))
        return RolloutBatch.from_groups(list(sampler.sample(toy.requests([[3, 4], [5]]))), pad_id=0)

    ours, theirs = sampled(model), sampled(merged)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert not torch.equal(sampled(plain).tokens, ours.tokens)
    scored = logprobs(model, ours)
    torch.testing.assert_close(ours.behaviour_logprobs, scored, atol=1e-5, rtol=1e-5)


def test_the_random_half_follows_from_the_seed_and_leaves_the_global_state_alone() -> None:
    settings = LoraSettings(rank=4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = toy.model(0)
    torch.set_rng_state(state)
    first = apply_lora(model, settings, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = apply_lora(toy.model(0), settings, seed=1), apply_lora(toy.model(0), settings, seed=2)
    ours, same, differs = (adapter_state(m, m.state_dict()) for m in (first, again, other))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not all(torch.equal(ours[name], differs[name]) for name in ours)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rank": 0}, "model.lora.rank\n    got:      0\n    expected: at least 1"),
        ({"alpha": 0}, "model.lora.alpha\n    got:      0\n    expected: at least 1"),
        ({"dropout": 0.1}, "model.lora.dropout: the policy that learns has to be the one that sampled"),
        ({"target_modules": []}, "model.lora.target_modules: no layer would learn"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraSettings(**arguments)
    assert text in str(caught.value)


def test_unknown_and_unfit_layers_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_lora(toy.model(0), LoraSettings(target_modules=["q_proj", "v_prj"]))
    assert str(caught.value) == (
        "model.lora.target_modules: Qwen3ForCausalLM has no layer 'v_prj'\n"
        "    got:      v_prj\n"
        "    expected: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj\n"
        "    try:      v_proj"
    )
    for name, got in (("embed_tokens", "Embedding"), ("mlp", "a group of layers"), ("q_norm", "Qwen3RMSNorm")):
        with pytest.raises(ConfigError, match=f"'{name}' is no linear layer\n    got:      {got}"):
            apply_lora(toy.model(0), LoraSettings(target_modules=[name]))


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    settings = LoraSettings(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match="the output head shares its weight with the embeddings"):
        apply_lora(toy.model(0, tied=True), settings)
    apply_lora(toy.model(0, tied=False), settings)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError) as caught:
        apply_lora(toy.model(0), LoraSettings())
    assert "try:      pip install distillkit[lora]" in str(caught.value)
