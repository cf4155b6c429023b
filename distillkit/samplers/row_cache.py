"""A key/value cache whose rows come and go while it is being decoded from.

`transformers.DynamicCache` concatenates every layer's keys and values for each token and copies the whole cache when a
row leaves. Here a layer is a buffer with room to grow: a token is one write, a row that leaves is replaced by the last
one, and a new row takes a free place. Rows are right-aligned: the newest token of each is in the last column; columns
before a row's first token are masked out by the caller's attention mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["RowCache", "RowLayer", "unsupported_layers"]

# DummyLayer, of layers without a cache, is new in transformers 5.20.
_SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))
"""Exactly these: a subclass may hold more state than keys and values."""


def unsupported_layers(template: Cache) -> list[str]:
    """Return the class names of the layers of `template` whose rows cannot be selected, sorted, each once."""
    return sorted({type(layer).__name__ for layer in template.layers if type(layer) not in _SUPPORTED})


class RowLayer(CacheLayerMixin):
    """Keys and values of one attention layer, [rows, heads, columns, head size] each.

    Args:
        window: the layer attends to this many columns, the current one included (None: to all), and keeps one less.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, *, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.is_sliding = window is not None
        self.rows = 0
        self.columns = 0
        """Columns that a full-attention layer holds; the position count of the longest row."""
        self.row_limit = 0
        """Rows that a new buffer has room for."""
        self._keys = self._values = torch.empty(0)
        self._end = 0

    def _kept(self, columns: int) -> int:
        return columns if self.window is None else min(columns, self.window - 1)

    def add(self, keys: Tensor, values: Tensor, index: Tensor, columns: int) -> None:
        """Append the rows `index` [k] of prefilled [P, heads, C, head size], the longest of `columns` tokens."""
        rows, width = self.rows + len(index), min(self._kept(columns), keys.shape[2])
        kept = self._kept(max(self.columns, columns))
        if not self.is_initialized or rows > self._keys.shape[0] or kept > self._end:
            self.row_limit = max(self.row_limit, rows)
            self._allocate(keys, values, kept)
        self.columns = max(self.columns, columns)
        place = (slice(self.rows, rows), slice(None), slice(self._end - width, self._end))
        self._keys[place] = keys[:, :, keys.shape[2] - width :].index_select(0, index)
        self._values[place] = values[:, :, values.shape[2] - width :].index_select(0, index)
        self.rows = rows

    def fill(self, holes: Tensor, sources: Tensor, rows: int, columns: int) -> None:
        """Copy the rows `sources` over the rows `holes`; keep the first `rows` rows, the last `columns` columns."""
        self.columns, self.rows = columns, rows
        kept = slice(self._end - self._kept(columns), self._end)
        if len(holes):
            for buffer in (self._keys, self._values):
                view = buffer[:, :, kept]
                view.index_copy_(0, holes, view.index_select(0, sources))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for `key_states`, `value_states` [rows, heads, q, head size]."""
        self._allocate(key_states, value_states, self._kept(self.columns))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, q, head size]; return the columns to attend to, new ones included."""
        new, kept = key_states.shape[2], self._kept(self.columns)
        if not self.is_initialized or self._end + new > self._keys.shape[2]:
            self._allocate(key_states, value_states, kept)
        place = (slice(0, self.rows), slice(None), slice(self._end, self._end + new))
        self._keys[place], self._values[place] = key_states, value_states
        seen = (slice(0, self.rows), slice(None), slice(self._end - kept, self._end + new))
        self._end += new
        self.columns += new
        return self._keys[seen], self._values[seen]

    def _allocate(self, keys: Tensor, values: Tensor, kept: int) -> None:
        """Move to new buffers with `kept` columns on the left of the end and free columns on its right."""
        spare = 32 + kept // 4
        old = self._kept(self.columns)
        for name, like in (("_keys", keys), ("_values", values)):
            # Zeros: a masked column has weight 0, and 0 times whatever empty memory holds may be NaN.
            buffer = like.new_zeros(self.row_limit, like.shape[1], kept + spare, like.shape[3])
            if self.rows:
                source = getattr(self, name)[: self.rows, :, self._end - old : self._end]
                buffer[: self.rows, :, kept - old : kept] = source
            setattr(self, name, buffer)
        self._end = kept
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns `update` will return, and the column number of the first."""
        kept = self._kept(self.columns)
        return kept + query_length, self.columns - kept

    def get_seq_length(self) -> int:
        """Return the number of columns."""
        return self.columns

    def get_max_length(self) -> int:
        """Return the window, or -1: no limit."""
        return -1 if self.window is None else self.window


class RowCache(Cache):
    """One `RowLayer` for each attention layer of `template`, an empty `DynamicCache` of the model.

    Args:
        template: says which layers the model has; `unsupported_layers(template)` must be empty.
    """

    def __init__(self, template: Cache) -> None:
        self._row_layers: list[RowLayer] = []
        layers: list[Any] = []
        for layer in template.layers:
            if isinstance(layer, DynamicLayer):
                self._row_layers.append(RowLayer(window=getattr(layer, "sliding_window", None)))
                layers.append(self._row_layers[-1])
            else:
                layers.append(layer)
        super().__init__(layers=layers)

    @property
    def columns(self) -> int:
        """Columns in use: the token count of the longest row."""
        return self._row_layers[0].columns

    def add(self, prefilled: Cache, index: Tensor, columns: int, row_limit: int) -> None:
        """Append the rows `index` [k] int64 of a prefilled, left-padded cache.

        Args:
            prefilled: the cache of a forward over prompts [P, C].
            index: which of the P rows, repeated as often as wanted.
            columns: tokens of the longest of them.
            row_limit: rows that there will be at most.
        """
        sources = [layer for layer in prefilled.layers if isinstance(layer, DynamicLayer)]
        for layer, source in zip(self._row_layers, sources, strict=True):
            assert source.keys is not None and source.values is not None
            layer.row_limit = row_limit
            layer.add(source.keys, source.values, index, columns)

    def fill(self, holes: Tensor, sources: Tensor, rows: int, columns: int, row_limit: int) -> None:
        """Let rows leave: the rows `sources` take the places `holes` [k]; `rows` rows and `columns` columns remain."""
        for layer in self._row_layers:
            layer.row_limit = max(row_limit, rows)
            layer.fill(holes, sources, rows, columns)
