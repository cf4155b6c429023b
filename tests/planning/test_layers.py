"""Sizes and bytes that the plan is made of, against transformers and autograd themselves."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from distillkit import registry
from distillkit.planning.head_arrays import head_arrays
from distillkit.planning.known_models import KNOWN_MODELS
from distillkit.planning.layers import cache_columns, saved_columns
from distillkit.planning.model_shape import read_shape, shape_of
from distillkit.samplers.row_cache import RowCache
from distillkit.scorer import ScorePlan

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 200, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOKENS = 37


def config(kind: Any, layers: int, **more: Any) -> Any:
    return kind(**SIZES, num_hidden_layers=layers, **({} if kind is Qwen2Config else {"head_dim": 24}), **more)


def saved(kind: Any, layers: int, dtype: torch.dtype, *, autocast: bool) -> int:
    """Bytes of the activations that autograd keeps of a model's backbone."""
    torch.manual_seed(0)
    model = Auto.from_config(config(kind, layers), dtype=dtype).train()
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if TOKENS in tensor.shape:  # not weights, nor their copies
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        model.base_model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("kind", [Qwen3Config, Qwen2Config, LlamaConfig])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_a_layer_keeps_what_the_formula_says(kind: Any, dtype: torch.dtype, autocast: bool) -> None:
    layer = saved(kind, 3, dtype, autocast=autocast) - saved(kind, 2, dtype, autocast=autocast)
    shape = shape_of(config(kind, 2), name="m")
    arrays = saved_columns(shape, dtype.itemsize, autocast=autocast)
    formula = TOKENS * sum(columns * width * count for columns, width, count in arrays)
    # What the formula leaves out: a number per token and norm or head.
    assert formula <= layer <= formula + TOKENS * 4 * (2 + 2 * 4 + 2)


def test_the_sizes_of_the_recipes_models_are_the_published_ones() -> None:
    billions = {name: read_shape(name, where="w", option="--o").parameters / 1e9 for name in KNOWN_MODELS}
    published = {
        "Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.721, "Qwen/Qwen3-8B": 8.191, "Qwen/Qwen3-32B": 32.762,
        "Qwen/Qwen2.5-Math-7B": 7.616, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.777,
    }  # fmt: skip
    for name, size in published.items():
        assert billions[name] == pytest.approx(size, abs=6e-4), name


def test_a_shape_counts_tied_heads_experts_windows_and_adapters() -> None:
    tied, untied = (shape_of(config(Qwen3Config, 2, tie_word_embeddings=tie), name="m") for tie in (True, False))
    assert untied.parameters - tied.parameters == 128 * 64 == tied.head_parameters
    assert tied.matrix_parameters == untied.matrix_parameters
    assert sum(untied.tensors) == untied.parameters
    experts = shape_of(
        config(Qwen3MoeConfig, 2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16), name="m"
    )
    assert experts.intermediate == 32
    assert experts.parameters - experts.active_parameters == 2 * 6 * 3 * 16 * 64
    sliding = config(Qwen2Config, 2, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert shape_of(sliding, name="m").windows == (None, 9)
    per_layer = {"q_proj": 64 + 96, "v_proj": 64 + 48}
    assert tied.adapter_parameters(4, None) == 2 * 4 * sum(per_layer.values())
    assert tied.adapter_parameters(4, ["q_proj"]) == 2 * 4 * per_layer["q_proj"]
    assert tied.adapter_parameters(4, "all-linear") > tied.adapter_parameters(4, None)


def test_the_planned_columns_are_those_of_the_samplers_cache() -> None:
    prompt, new = 20, 90
    prefilled, cache = DynamicCache(), RowCache(DynamicCache(config=config(Qwen3Config, 1)))
    prefilled.update(torch.zeros(1, 2, prompt, 4), torch.zeros(1, 2, prompt, 4), 0)
    cache.add(prefilled, torch.zeros(3, dtype=torch.long), prompt, 3)
    for _ in range(new - 1):
        keys, _ = cache.update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4), 0)
    assert keys.shape[2] == prompt + new - 1
    assert keys.untyped_storage().nbytes() == 4 * 3 * 2 * 4 * cache_columns(prompt, new)


def test_a_divergence_is_counted_by_running_it() -> None:
    def arrays(name: str | None, **more: Any) -> tuple[float, float]:
        part = None if name is None else registry.load(registry.find("divergence", name))()
        plan = ScorePlan(sampling_temperature=1.0, distil_temperature=more.pop("distil", 1.0), divergence=part)
        found = head_arrays(plan, autocast=more.pop("autocast", False))
        return found.chunk, found.block

    # Logits, whose gradient takes their place; log-softmax, the gradient in it, and that in the logits.
    assert arrays(None) == pytest.approx((1, 3), abs=0.1)
    assert arrays("k2") == pytest.approx((1, 3), abs=0.1)
    assert arrays(None, distil=0.5) == pytest.approx((1, 4), abs=0.1)
    assert arrays(None, autocast=True) == pytest.approx((0.5, 3), abs=0.1)
    (topk, some), (full, more), (_, most) = (arrays(name) for name in ("topk", "reverse_kl", "jsd"))
    assert topk == pytest.approx(1, abs=0.1) and full == pytest.approx(2, abs=0.1)  # the teacher's logits
    assert 3 < some < more < most
