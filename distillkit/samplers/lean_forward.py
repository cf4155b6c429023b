"""One token per row through a Llama-like decoder, by its own modules, without what transformers does around them.

With one token for each row, much of a forward's time goes into masks, keyword arguments, norms of six operations and
rotations of ten. This one runs the same layers with about a third of the operations. It stands in for the model's own
forward only after it gave the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers.cache_utils import Cache

from distillkit.backbone import LMHead, matrix_of
from distillkit.samplers.decoding import Forward
from distillkit.samplers.row_cache import RowCache

__all__ = ["LeanForward", "gives_same_logits"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = ("self_attn", "mlp", *_NORMS)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_TILE = 4096


class LeanForward:
    """Pre-norm layers, rotary positions, root-mean-square norms, grouped-query attention: Llama, Qwen2, Qwen3 and kin.

    Modules are called, so adapters and biases count, except those that are found to be plain matrices. Made anew for
    every sampling: it refers to the weights as they are.

    Args:
        model: a transformers causal language model whose `fits` is true.
    """

    def __init__(self, model: Any) -> None:
        backbone = model.base_model
        self._embed, self._layers = backbone.embed_tokens, backbone.layers
        self._rotary, self._head = backbone.rotary_emb, LMHead(model)
        self._blocks = [_Gated(layer.mlp) if _Gated.fits(layer.mlp) else layer.mlp for layer in backbone.layers]
        self._norms = [tuple(_Norm(getattr(layer, name)) for name in _NORMS) for layer in backbone.layers]
        self._head_norms = [_HeadNorms(layer.self_attn) for layer in backbone.layers]
        self._last_norm = _Norm(backbone.norm)

    @staticmethod
    def fits(model: Any) -> bool:
        """Return whether the model has the modules that this forward calls, no others, no hooks on what it skips."""
        backbone = model.base_model
        if not all(hasattr(backbone, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
            return False
        for layer in backbone.layers:
            if {name for name, _ in layer.named_children()} != set(_PARTS):
                return False
            attention = layer.self_attn
            more = {name for name, _ in attention.named_children()} - set(_PROJECTIONS)
            if more not in (set(), {"q_norm", "k_norm"}) or not all(hasattr(attention, name) for name in _PROJECTIONS):
                return False
            norms = [getattr(layer, name) for name in _NORMS] + [getattr(attention, name) for name in more]
            if not all(hasattr(norm, "variance_epsilon") for norm in [*norms, backbone.norm]):
                return False
            if any(_is_hooked(module) for module in (layer, attention, *norms)):
                return False
        return not any(_is_hooked(module) for module in (model, backbone, backbone.norm))

    def __call__(self, ids: Tensor, attended: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """Append one token to each row and return the logits [n, V] after it.

        Args:
            ids: [n, 1].
            attended: [n, C + 1] bool, the columns of the cache that a row attends to; None for all.
            positions: [n, 1] of the tokens in their sequences.
            cache: C columns, to which this adds one.
        """
        hidden = self._embed(ids[:, 0])
        turn = self._turn(hidden, positions)
        mask = None
        if attended is not None:
            zeros = torch.zeros(attended.shape, dtype=hidden.dtype, device=hidden.device)
            mask = zeros.masked_fill_(~attended, -torch.inf)[:, None, None, :]
        for i, layer in enumerate(self._layers):
            before_attention, before_block = self._norms[i]
            attended = _attend(layer.self_attn, self._head_norms[i], before_attention(hidden), turn, mask, cache, i)
            hidden = hidden + attended
            hidden = hidden + self._blocks[i](before_block(hidden))
        return _logits(self._head, self._last_norm(hidden))

    def _turn(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [n, 1, D]: a rotation is x · cos + (x with its halves swapped) · sin."""
        cos, sin = self._rotary(hidden.unsqueeze(1), positions)
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


@torch.no_grad()
def gives_same_logits(lean: Forward, own: Forward, new_cache: Callable[[], Cache], device: torch.device) -> bool:
    """Compare one token after two prompts of different lengths, once with and once without a mask."""
    prompts, positions = torch.tensor([[0, 1, 2], [0, 3, 2]]), torch.tensor([[0, 1, 2], [0, 0, 1]])
    if any(getattr(layer, "is_sliding", False) for layer in new_cache().layers):
        return False  # which shows beyond the window only
    for attended in (None, torch.tensor([[True] * 4, [False, *[True] * 3]], device=device)):
        places = torch.arange(3).expand(2, 3) if attended is None else positions
        found = []
        for forward in (own, lean):
            prefilled, cache = new_cache(), RowCache(new_cache())
            own(prompts.to(device), None if attended is None else attended[:, 1:], places.to(device), prefilled)
            cache.add(prefilled, torch.arange(2, device=device), 3, 2)
            token = torch.tensor([[1], [3]], device=device)
            found.append(forward(token, attended, places[:, -1:].to(device) + 1, cache))
        logits, ours = found[0].float(), found[1].float()
        if not (ours - logits).norm() < (1e-3 if torch.finfo(found[0].dtype).bits >= 32 else 5e-2) * logits.norm():
            return False
    return True


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Norm:
    """values / √(mean of their squares + ε) · weight, over the last dimension, as the module `norm` says.

    Args:
        norm: with `weight` and `variance_epsilon`.
        weight: [.., n] instead of the module's.
    """

    def __init__(self, norm: Any, weight: Tensor | None = None) -> None:
        self._weight: Tensor = norm.weight if weight is None else weight
        self._norm, self._epsilon, size = norm, norm.variance_epsilon, self._weight.shape[-1]
        self._lean = self._weight.device.type == "cpu" and self._weight.dtype == torch.float32
        self._scaled = self._weight * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(size * self._epsilon))

    def __call__(self, values: Tensor) -> Tensor:
        if values.dtype != self._weight.dtype:  # under autocast
            out: Tensor = self._norm(values)
            return out
        if self._lean:  # √(Σ x² + n ε) by hypot: four operations, where torch's own takes seven on a CPU
            length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
            return values * self._scaled / torch.hypot(length, self._floor)
        return rms_norm(values, self._weight.shape[-1:], None, self._epsilon) * self._weight


class _HeadNorms:
    """Queries [n, h, D] and keys [n, k, D] normed, if the layer does that, and side by side: [n, h + k, D]."""

    def __init__(self, attention: Any) -> None:
        self._norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        self._each = [_Norm(norm) for norm in self._norms]
        self._both: _Norm | None = None

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        if not self._norms:
            return torch.cat([queries, keys], dim=1)
        of_queries, of_keys = self._norms
        dtypes = {queries.dtype, keys.dtype, of_queries.weight.dtype, of_keys.weight.dtype}
        if len(dtypes) > 1 or of_queries.variance_epsilon != of_keys.variance_epsilon:
            return torch.cat([norm(values) for norm, values in zip(self._each, (queries, keys), strict=True)], dim=1)
        if self._both is None:
            weights = [
                norm.weight.expand(values.shape[1:]) for norm, values in zip(self._norms, (queries, keys), strict=True)
            ]
            self._both = _Norm(of_queries, torch.cat(weights))
        return self._both(torch.cat([queries, keys], dim=1))


class _Gated:
    """act(hidden · gateᵀ) · (hidden · upᵀ) · downᵀ, the two wide products transposed: see `_transposed`."""

    def __init__(self, mlp: Any) -> None:
        self._gate, self._up = mlp.gate_proj.weight, mlp.up_proj.weight
        self._act, self._down = mlp.act_fn, mlp.down_proj

    @staticmethod
    def fits(mlp: Any) -> bool:
        """Return whether this is all that the block does; the width decides whether it is worth it."""
        if {name for name, _ in mlp.named_children()} != _GATED or _is_hooked(mlp):
            return False
        matrices = [matrix_of(mlp.gate_proj), matrix_of(mlp.up_proj)]
        return all(m is not None and m[1] is None and _is_wide(m[0]) for m in matrices)

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = (_transposed(hidden, weight) for weight in (self._gate, self._up))
        out: Tensor = self._down((self._act(gate) * up).t().contiguous())
        return out


def _is_wide(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and len(weight) >= 2 * weight.shape[1]


def _transposed(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return weight [out, in] · hiddenᵀ [in, n].

    For few rows and a wide result the CPU's BLAS is several times faster this way round, and with two rows than with
    one (2 rows, in 256, out 151,936: 37 ms as hidden · weightᵀ, 4 ms so).
    """
    if len(hidden) == 1:
        return torch.mm(weight, hidden.repeat(2, 1).t())[:, :1]
    return torch.mm(weight, hidden.t())


def _logits(head: LMHead, hidden: Tensor) -> Tensor:
    matrix = head.matrix()
    if matrix is None or matrix[1] is not None or not _is_wide(matrix[0]):
        return head(hidden)
    weight, _ = matrix
    out = hidden.new_empty(len(hidden), len(weight))
    for start in range(0, len(weight), _TILE):  # so that turning a part back finds it in cache
        tile = slice(start, start + _TILE)
        out[:, tile] = _transposed(hidden, weight[tile]).t()
    return head.finish(out)


def _attend(
    attention: Any,
    head_norms: _HeadNorms,
    hidden: Tensor,
    turn: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Cache,
    layer: int,
) -> Tensor:
    rows, size = len(hidden), attention.head_dim
    queries, keys, values = (
        projection(hidden).view(rows, -1, size) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads, groups = queries.shape[1], keys.shape[1]
    both, (cos, sin) = head_norms(queries, keys), turn
    both = torch.addcmul(both * cos, both.roll(size // 2, dims=-1), sin)
    queries, keys = both.split([heads, groups], dim=1)
    keys, values = cache.update(keys.unsqueeze(2), values.unsqueeze(2), layer)
    # The heads that share a key stand as its queries: nothing is repeated.
    grouped = queries.reshape(rows, groups, heads // groups, size)
    found = _read(grouped, keys.to(grouped.dtype), values.to(grouped.dtype), mask, attention.scaling)
    out: Tensor = attention.o_proj(found.reshape(rows, heads * size))
    return out


def _read(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of a few queries per head [n, h, g, D] to C columns [n, h, C, D], [n, 1, 1, C] added to the scores.

    A CPU's fused kernel is made for long queries: for one token, two batched products take half its time.
    """
    if queries.device.type != "cpu" or queries.dtype != torch.float32:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(queries * scale, keys.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores if mask is None else scores + mask, dim=-1), values)
