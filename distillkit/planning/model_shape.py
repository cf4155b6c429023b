"""The sizes of a model, from its config alone: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillkit import embedded
from distillkit.errors import ModelError, problem
from distillkit.planning.known_models import KNOWN_MODELS

__all__ = ["ModelShape", "read_shape", "shape_of"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's sizes. Parameters are counted on a model without memory (`meta`), so they are exact.

    Attributes:
        name: what it was read from.
        layers: decoder layers.
        hidden: H.
        intermediate: of the MLP, as one token meets it (of a mixture of experts: of all experts it is sent to).
        query: query heads × head size, columns of q and of the attention's output.
        key_value: key/value heads × head size, columns of k and of v.
        vocabulary: V of the output head.
        parameters: all of them, a tied head once.
        active_parameters: those that one token meets; less than `parameters` in a mixture of experts.
        layer_parameters: of the largest decoder layer.
        tensors: elements of each parameter tensor, the largest first.
        tied: head and embedding share their weights.
        head_norm: q and k are normalised per head (Qwen3).
        windows: per layer, the columns that a sliding-window layer keeps; None attends to all.
        linears: (name, rows out, columns in) of every linear layer but the head.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    parameters: int
    active_parameters: int
    layer_parameters: int
    tensors: tuple[int, ...]
    tied: bool
    head_norm: bool
    windows: tuple[int | None, ...]
    linears: tuple[tuple[str, int, int], ...]

    @property
    def head_parameters(self) -> int:
        """Elements of the output head, V · H."""
        return self.vocabulary * self.hidden

    @property
    def matrix_parameters(self) -> int:
        """Parameters that a token is multiplied with: all active ones but an embedding table that is only read."""
        return self.active_parameters - (0 if self.tied else self.head_parameters)

    def adapter_parameters(self, rank: int, targets: list[str] | str | None) -> int:
        """Return the trainable parameters of LoRA: Σ rank · (out + in) over the layers named by `targets`.

        `all-linear` is every linear layer but the head; None is `q_proj` and `v_proj`, peft's choice for the Llama
        family.
        """
        wanted = None if targets == "all-linear" else tuple(targets or ("q_proj", "v_proj"))
        return sum(
            rank * (rows + columns)
            for name, rows, columns in self.linears
            if wanted is None or name.rpartition(".")[2] in wanted
        )


def read_shape(source: str | Path, *, where: str, option: str) -> ModelShape:
    """Return the sizes of a checkpoint folder, a `config.json`, an `embedded:` model, a known name, or a hub name.

    Args:
        source: folder, file or name.
        where: YAML path or option that named it, for error texts.
        option: the command-line option that takes a config in its place.

    Raises:
        ModelError: there is no config, or it is not one of a decoder whose sizes are known.
    """
    name = str(source)
    found = embedded.resolve(source)
    if not Path(found).exists() and name in KNOWN_MODELS:
        return shape_of(_known(KNOWN_MODELS[name]), name=name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(found, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            problem(
                f"{where}: cannot read the config of this model",
                got=f"{name} ({reason})",
                expected="a checkpoint folder, its config.json, or a hub name that can be reached",
                hint=f"{option} FOLDER_OR_CONFIG_JSON, or {option} NAME with one of {', '.join(KNOWN_MODELS)}",
            )
        ) from error
    return shape_of(config, name=name)


def shape_of(config: Any, *, name: str) -> ModelShape:
    """Return the sizes that a Hugging Face config describes.

    Raises:
        ModelError: not a decoder with the usual sizes.

    Example:
        >>> from transformers import Qwen3Config
        >>> shape_of(Qwen3Config(num_hidden_layers=2, vocab_size=512), name="small").layers
        2
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [field for field in wanted if not isinstance(getattr(text, field, None), int)]
    if missing:
        expected = "a decoder's config"
        raise ModelError(problem(f"{name}: sizes are missing in its config", got=", ".join(missing), expected=expected))
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(problem(f"{name}: its config makes no causal language model", got=str(error)[:200])) from error
    sizes = {id(p): p.numel() for p in model.parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [module for key, module in model.named_modules() if key.rpartition(".")[0].endswith("layers")]
    per_layer = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    linears = tuple(
        (key, module.out_features, module.in_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    total = sum(sizes.values())
    idle, intermediate = _experts(text, model)
    count = int(text.num_hidden_layers)
    return ModelShape(
        name=name,
        layers=count,
        hidden=int(text.hidden_size),
        intermediate=intermediate,
        query=heads * size,
        key_value=int(getattr(text, "num_key_value_heads", None) or heads) * size,
        vocabulary=int(text.vocab_size),
        parameters=total,
        active_parameters=total - idle,
        layer_parameters=per_layer,
        tensors=tuple(sorted(sizes.values(), reverse=True)),
        tied=head.weight is model.get_input_embeddings().weight,  # type: ignore[operator]
        head_norm=any(key.endswith("q_norm") for key, _ in model.named_modules()),
        windows=tuple(_window(text, i) for i in range(count)),
        linears=linears,
    )


def _known(entries: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    fields = {key: value for key, value in entries.items() if key != "model_type"}
    return CONFIG_MAPPING[str(entries["model_type"])](**fields)


def _experts(text: Any, model: nn.Module) -> tuple[int, int]:
    """Parameters of experts that one token is not sent to, and the MLP columns that it meets."""
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    if not experts:
        return 0, int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    used = int(getattr(text, "num_experts_per_tok", 1))
    width = int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
    routed = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    shared = int(getattr(text, "shared_expert_intermediate_size", 0) or 0)
    return routed * (experts - used) // experts, width * used + shared


def _window(text: Any, layer: int) -> int | None:
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if kinds is not None:
        return int(window) if window and kinds[layer] == "sliding_attention" else None
    return int(window) if window and getattr(text, "use_sliding_window", True) else None
