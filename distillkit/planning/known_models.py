"""Sizes of models that the shipped recipes name, so that a plan needs no download.

Copied by hand from the `config.json` of each model on the Hugging Face hub; entries as in its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["KNOWN_MODELS"]


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


def _qwen2(hidden: int, intermediate: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }


_QWEN3_1_7B = _qwen3(2048, 6144, 28, 16, tied=True)
_QWEN3_8B = _qwen3(4096, 12288, 36, 32, tied=False)
_QWEN2_7B = _qwen2(3584, 18944, 28, 4, 152064)

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _QWEN3_1_7B,
    "Qwen/Qwen3-1.7B-Base": _QWEN3_1_7B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-8B-Base": _QWEN3_8B,
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN2_7B,
    "Skywork/Skywork-OR1-Math-7B": _QWEN2_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(1536, 8960, 12, 2, 151936),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2_7B,
}
"""Hub name -> entries of the model's config."""
