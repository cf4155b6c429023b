"""The layers and the head of a causal language model, run apart."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.functional.packing import in_order_micro_batches, micro_batches, packed_micro_batches
from distillkit.packed import PackedRow, packed_states, packs
from distillkit.tied import TiedGradient
from distillkit.types import RolloutBatch

__all__ = [
    "Batching",
    "LMHead",
    "available",
    "chunk_rows",
    "matrix_of",
    "predicting_states",
    "project",
    "token_batches",
]

Batching = Literal["packed", "sorted", "in_order"]
"""How rollouts share a forward.

`packed`: one row without padding, a prompt once for all the rollouts in it that answer it. `sorted`: padded, those of
similar length together. `in_order`: padded, as they come. Scores and gradients are the same.
"""

_CHUNK_ELEMENTS = {"cpu": 2**24}
_CHUNK_ELEMENTS_ELSEWHERE = 2**26
"""Logits per head chunk when `head_chunk` is not set: 64 MiB in float32 on a CPU, where a larger product is hardly
faster and its memory would stand out; 256 MiB on a GPU."""

_TILE = 1024
"""Head rows per product on a CPU: as large as stays in its cache."""


def _inner(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a peft wrapper (whose adapters are injected in place), or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    assert isinstance(inner, PreTrainedModel)
    return inner


class LMHead:
    """From hidden states [M, H] to logits [M, V] float32 through the model's own head.

    The head module is called (so bias and adapters count), then the config's logit scale and soft-capping. Calls
    follow the model's current weights; `layer` stands in for its head.
    """

    def __init__(self, model: nn.Module, *, layer: nn.Module | None = None) -> None:
        self._model, self._layer = _inner(model), layer
        config = self._model.config.get_text_config()
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.finish(self.module_output(hidden))

    def module_output(self, hidden: Tensor) -> Tensor:
        """Return what the head module makes of `hidden` [M, H], in its own dtype: logits but for `finish`."""
        head = self._module()
        raw: Tensor = head(hidden.to(next(head.parameters()).dtype))
        return raw

    def finish(self, raw: Tensor) -> Tensor:
        """Return logits float32 (float64 stays) from the module's output: scale and soft-capping."""
        logits = raw if raw.dtype == torch.float64 else raw.float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @property
    def only_widens(self) -> bool:
        """Whether `finish` does no more than return float32."""
        return self._scale == 1.0 and self._softcap is None

    def matrix(self) -> tuple[Tensor, Tensor | None] | None:
        """Return `matrix_of` the head."""
        return matrix_of(self._module())

    def tied(self) -> TiedGradient | None:
        """Return what makes one gradient of head and embedding, None where they do not share one plain matrix."""
        matrix = self.matrix() if self._layer is None else None
        embedding = self._model.get_input_embeddings()
        return None if matrix is None or embedding is None else TiedGradient.of(matrix[0], embedding)

    def _module(self) -> nn.Module:
        head = self._layer or self._model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head


def matrix_of(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weight [out, in] and bias [out] of a module that is no more than these; None where it has to be called.

    An adapter, a hook (a strategy that gathers weights has one) or a tensor of another kind makes it more.
    """
    if type(module) is not nn.Linear or type(module.weight) not in (nn.Parameter, Tensor) or "forward" in vars(module):
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return None if any(hooks) else (module.weight, module.bias)


@torch.no_grad()
def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write `hidden` [M, H] times the first C rows of `weight` [V, H], plus `bias`, to `out` [M, C]; return it."""
    limit = out.shape[1]
    tile = _TILE if out.device.type == "cpu" else limit
    for start in range(0, limit, tile):
        rows = slice(start, min(start + tile, limit))
        torch.mm(hidden, weight[rows].t(), out=out[:, rows])
    return out if bias is None else out.add_(bias[:limit])


def available(batching: Batching, model: nn.Module) -> Batching:
    """Return `batching`, or `sorted` where the model, or the device that it is on, runs no packed rows."""
    return "sorted" if batching == "packed" and not packs(_inner(model)) else batching


def token_batches(rollouts: RolloutBatch, budget: int, batching: Batching) -> list[list[int]]:
    """Split rollouts into forwards of at most `budget` tokens, padding included: positions, each once."""
    lengths = rollouts.lengths.tolist()
    if batching == "sorted":
        return micro_batches(lengths, budget)
    if batching == "in_order":
        return in_order_micro_batches(lengths, budget)
    return packed_micro_batches(rollouts.group_id.tolist(), rollouts.prompt_lengths.tolist(), lengths, budget)


def predicting_states(model: nn.Module, batch: RolloutBatch, *, packed: bool = False) -> Tensor:
    """Return the hidden states [M, H] that predict the `loss_mask` tokens of `batch`, in row-major order.

    No attention mask is passed: rollouts are right-padded and attention is causal, so no real token sees padding, and
    the kernels may take their fast causal path. With `packed` there is no padding at all.
    """
    backbone = _inner(model).base_model
    assert isinstance(backbone, nn.Module)
    if packed:
        row = PackedRow.of(batch.tokens, batch.prompt_lengths, batch.lengths)
        predicting = row.place[:, :-1][batch.loss_mask[:, 1:]]
        return packed_states(backbone, batch.tokens, row).index_select(0, predicting)
    states: Tensor = backbone(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return states[:, :-1][batch.loss_mask[:, 1:]]


def chunk_rows(vocabulary: int, head_chunk: int | None, device: str) -> int:
    """Return the token positions per head chunk: `head_chunk`, or what keeps a chunk's logits near 64 MiB on a CPU.

    On another kind of device, 256 MiB.
    """
    if head_chunk is not None:
        return head_chunk
    return max(_CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS_ELSEWHERE) // vocabulary, 16)
