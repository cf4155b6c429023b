"""The lean forward: the model's own logits on ragged rows, and which models it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from distillkit.samplers.hf import _forward
from distillkit.samplers.lean_forward import LeanForward, gives_same_logits
from distillkit.samplers.row_cache import RowCache
from tests.samplers.tiny import VOCABULARY, ids, requests, sampler, student


def decoded(model: PreTrainedModel, forward: Any, lengths: list[int], steps: int) -> Tensor:
    """Logits [steps, n, V] of fixed tokens after left-padded prompts, and the cache's keys."""
    own, cache = _forward(model), RowCache(DynamicCache(config=model.config))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCABULARY, (len(lengths), max(lengths) + steps), generator=generator)
    seen = torch.tensor(lengths)
    columns = torch.arange(max(lengths))
    attended = columns >= max(lengths) - seen[:, None]
    places = (columns - (max(lengths) - seen[:, None])).clamp(min=0)
    same = len(set(lengths)) == 1
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        own(tokens[:, : max(lengths)], None if same else attended, places, prefilled)
        cache.add(prefilled, torch.arange(len(lengths)), max(lengths), len(lengths))
        found = []
        for step in range(steps):
            attended = torch.cat([attended, torch.ones(len(lengths), 1, dtype=torch.bool)], dim=1)
            last = tokens[:, max(lengths) + step, None]
            found.append(forward(last, None if same else attended, (seen + step)[:, None], cache))
    return torch.stack(found)


def with_uneven_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Give every norm weights of its own: fresh ones are all 1."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = torch.rand(weight.shape, generator=generator).to(weight.dtype) + 0.5
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 9, 1, 4], [3]])
def test_logits_are_the_models_own(name: str, lengths: list[int], dtype: torch.dtype) -> None:
    model = with_uneven_norms(student(name)).to(dtype)
    assert LeanForward.fits(model)
    want = decoded(model, _forward(model), lengths, 40)
    got = decoded(model, LeanForward(model), lengths, 40)
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)


def test_query_and_key_norms_of_different_epsilon() -> None:
    model = with_uneven_norms(student("qwen3"))
    for layer in model.model.layers:
        layer.self_attn.k_norm.variance_epsilon = 0.3
    want = decoded(model, _forward(model), [2, 9, 1, 4], 5)
    torch.testing.assert_close(decoded(model, LeanForward(model), [2, 9, 1, 4], 5), want, rtol=1e-5, atol=1e-5)


def test_logits_under_autocast_are_the_models_own() -> None:
    model = with_uneven_norms(student("qwen3"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = (decoded(model, forward, [2, 9, 1, 4], 5) for forward in (_forward(model), LeanForward(model)))
    assert (got - want).norm() < 0.02 * want.norm()


def test_biases_and_adapters_count() -> None:
    model = student("qwen3").double()
    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).double().eval()
    inner = adapted.get_base_model()
    assert LeanForward.fits(inner)
    want = decoded(inner, _forward(adapted), [2, 6], 5)
    torch.testing.assert_close(
        decoded(inner, LeanForward(inner), [2, 6], 5), want.to(torch.float64), rtol=1e-5, atol=1e-5
    )
    with adapted.disable_adapter():
        assert not torch.allclose(decoded(inner, LeanForward(inner), [2, 6], 5), want.to(torch.float64), atol=1e-2)


def same(model: PreTrainedModel) -> bool:
    def new_cache() -> Cache:
        return DynamicCache(config=model.config)

    return gives_same_logits(LeanForward(model), _forward(model), new_cache, torch.device("cpu"))


def test_what_does_not_fit_or_differs_keeps_its_own_forward() -> None:
    assert not LeanForward.fits(student("gpt2")), "other modules"
    assert not LeanForward.fits(student("gemma3")), "four norms in a layer, and they add 1 to their weights"
    assert not same(student("mistral")), "sliding windows"
    hooked = student("llama")
    hooked.model.layers[1].register_forward_pre_hook(lambda module, args: None)
    assert not LeanForward.fits(hooked)
    scaled = student("llama")
    assert LeanForward.fits(scaled) and same(scaled)
    scaled.model.layers[0].self_attn.scaling *= 2
    assert same(scaled), "read from the module at every call"
    scaled.model.rotary_emb.register_forward_hook(lambda module, args, out: (out[0] * 0.5, out[1]))
    assert same(scaled), "modules that are called keep their hooks"


def test_a_model_whose_forward_adds_something_is_found_out() -> None:
    model = student("llama")
    layers = model.model.layers

    class Doubled(type(layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **given: Any) -> Any:
            return 2 * super().forward(*args, **given)

    layers[0].__class__ = Doubled
    assert LeanForward.fits(model)
    assert not same(model)


def test_the_sampler_draws_the_same_with_either() -> None:
    asked = requests([3, 17, 1, 9], group_size=3, max_new_tokens=12, temperature=1.0)
    model = student("qwen3")
    lean = list(sampler(model, stop=(7, 11, 20)).sample(asked))
    model.register_forward_pre_hook(lambda module, args: None)  # which the lean forward would not call
    own = list(sampler(model, stop=(7, 11, 20)).sample(asked))
    assert ids(lean) == ids(own)
