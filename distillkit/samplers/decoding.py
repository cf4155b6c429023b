"""The decoding loop: prefill each prompt once, draw tokens for many rows at a time, let finished rows leave.

`Decoder` runs the loop over a `RowCache`, with the draws of `distillkit.samplers.drawing`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from distillkit.errors import ModelError, problem
from distillkit.samplers.drawing import draw_tokens, row_uniforms
from distillkit.samplers.row_cache import RowCache
from distillkit.types import SampleRequest

__all__ = ["Completion", "Decoder", "Forward"]

Forward = Callable[[Tensor, Tensor | None, Tensor, Cache], Tensor]
"""(input ids [n, q], attended [n, C + q] bool or None for all, position ids [n, q], cache) -> logits [n, V] of the last
position."""

PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, in one prefill (a single longer prompt still goes through whole)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One finished row, on the CPU: `ids` [T] int64 with the end token if `stopped`, `logprobs` [T] float32."""

    request: int
    rollout: int
    ids: Tensor
    logprobs: Tensor
    stopped: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prefilled:
    """Prompts that went through the model: their cache, the logits [P, V] after them, their lengths [P]."""

    cache: Cache
    logits: Tensor
    lengths: NDArray[np.int64]


@dataclass(kw_only=True, eq=False)
class _Waiting:
    """A request with rollouts that have not begun; `prefilled` once some have."""

    request: int
    next_rollout: int = 0
    prefilled: _Prefilled | None = None
    row: int = 0


class Decoder:
    """Decodes every rollout of `requests`, at most `max_rows` at a time.

    Each live row owns a slot, its place in the output buffers; its place in the cache changes as rows leave. All
    requests share one `SamplingSettings`. Per token, one copy to the host: which rows drew an end token.

    Args:
        requests: longest prompts are begun first, so that prompts prefilled together are of similar length.
        forward: the model.
        new_cache: makes an empty `DynamicCache` for it.
        stop_ids: ids that end a completion.
        vocab_limit: ids at or beyond it are never drawn.
        pad_id: an id to pad prompts with on the left.
        device: of the model.
        max_rows: rows decoded at once.
        drop_finished: let a row leave when it ends; else it goes through the model until the last one of its batch.
        prefill_once: a prompt goes through the model once for its group; else once for each rollout.
    """

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        *,
        forward: Forward,
        new_cache: Callable[[], Cache],
        stop_ids: Sequence[int],
        vocab_limit: int,
        pad_id: int,
        device: torch.device,
        max_rows: int,
        drop_finished: bool = True,
        prefill_once: bool = True,
    ) -> None:
        self._requests, self._forward, self._new_cache = requests, forward, new_cache
        self._drop_finished, self._prefill_once = drop_finished, prefill_once
        self._settings = requests[0].settings
        self._vocab_limit, self._pad_id, self._device = vocab_limit, pad_id, device
        self._stop = torch.tensor(stop_ids, dtype=torch.long, device=device)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        self._waiting = deque(_Waiting(request=i) for i in order)
        self._waiting_rows = len(requests) * self._settings.group_size
        self._max_rows = min(max_rows, self._waiting_rows)

        size, length = self._max_rows, self._settings.max_new_tokens
        self._tokens = torch.empty(size, length, dtype=torch.long, device=device)
        self._logprobs = torch.empty(size, length, device=device)
        drawn = self._settings.temperature > 0
        self._uniforms = torch.empty(size, length, dtype=torch.float64, device=device) if drawn else None
        self._owner = [(0, 0)] * size
        self._prompt, self._count = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self._free = list(range(size - 1, -1, -1))

        self._cache = RowCache(new_cache())
        self._slots = np.zeros(0, dtype=np.int64)
        """[n]: the slot of each cache row."""
        self._over = np.zeros(size, dtype=np.bool_)
        """[slots]: rollouts that have ended and whose row is still there."""
        self._rows = torch.zeros(3, 0, dtype=torch.long, device=device)
        """[3, n], on the device: the slot, the tokens in the cache and the tokens drawn of each cache row."""
        self._advance = torch.tensor([[0], [1], [1]], device=device)
        self._done: dict[int, list[Completion]] = {}

    def run(self) -> list[list[Completion]]:
        """Decode until a request has all its rollouts; return those of each such request, in order; [] at the end."""
        while self._waiting or self._slots.size:
            if self._waiting:
                self._admit()
            complete = [i for i, rows in self._done.items() if len(rows) == self._settings.group_size]
            if complete:
                return [sorted(self._done.pop(i), key=lambda c: c.rollout) for i in complete]
            if self._slots.size:
                self._step()
        complete = list(self._done)
        return [sorted(self._done.pop(i), key=lambda c: c.rollout) for i in complete]

    def _step(self) -> None:
        """Feed the last token of every row and draw the next."""
        slot, seen, drawn = self._rows
        drawn = drawn.clamp(max=self._settings.max_new_tokens - 1)  # rows that are over draw on, for nothing
        last = self._tokens[slot, drawn - 1]
        columns = self._cache.columns + 1
        lengths, attended = self._prompt[self._slots] + self._count[self._slots], None
        if lengths.min() < columns:
            attended = torch.arange(columns, device=self._device) >= columns - 1 - seen.unsqueeze(1)
        logits = self._forward(last.unsqueeze(1), attended, seen.unsqueeze(1), self._cache)
        stopped = self._draw(logits, slot, drawn, self._slots)
        self._rows = self._rows + self._advance
        finished = stopped | (self._count[self._slots] == self._settings.max_new_tokens)
        finished &= ~self._over[self._slots]
        if finished.any():
            self._collect(self._slots[finished], stopped[finished])
            self._over[self._slots[finished]] = True
            if self._drop_finished or self._over[self._slots].all():
                self._leave(self._over[self._slots])

    def _draw(self, logits: Tensor, slot: Tensor, drawn: Tensor, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Draw a token for each row, write it to the row's slot, and return which rows stopped [n] bool."""
        uniforms = None if self._uniforms is None else self._uniforms[slot, drawn]
        ids, logprobs = draw_tokens(
            logits[:, : self._vocab_limit],
            uniforms,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
        )
        self._tokens[slot, drawn], self._logprobs[slot, drawn] = ids, logprobs
        self._count[slots] += 1
        stopped: NDArray[np.bool_] = torch.isin(ids, self._stop).cpu().numpy()
        return stopped

    def _collect(self, slots: NDArray[np.int64], stopped: NDArray[np.bool_]) -> None:
        """Copy finished rollouts out."""
        index = torch.from_numpy(slots).to(self._device)
        longest = int(self._count[slots].max())
        tokens, logprobs = self._tokens[index, :longest].cpu(), self._logprobs[index, :longest].cpu()
        for i, slot in enumerate(slots.tolist()):
            (request, rollout), count = self._owner[slot], int(self._count[slot])
            ids, values = tokens[i, :count].clone(), logprobs[i, :count].clone()
            done = Completion(request=request, rollout=rollout, ids=ids, logprobs=values, stopped=bool(stopped[i]))
            self._done.setdefault(request, []).append(done)

    def _leave(self, finished: NDArray[np.bool_]) -> None:
        """Move the last rows of the cache into the places of finished ones, and free their slots."""
        self._release(self._slots[finished])
        rows = int((~finished).sum())
        holes, sources = np.flatnonzero(finished[:rows]), rows + np.flatnonzero(~finished[rows:])
        order = np.arange(rows)
        order[holes] = sources
        self._slots = self._slots[order]
        on_device = [torch.from_numpy(x).to(self._device) for x in (order, holes, sources)]
        self._rows = self._rows[:, on_device[0]]
        columns = int((self._prompt + self._count)[self._slots].max(initial=1)) - 1
        self._cache.fill(on_device[1], on_device[2], rows, columns, self._row_limit())

    def _release(self, slots: NDArray[np.int64]) -> None:
        self._over[slots] = False
        self._free += slots.tolist()

    def _row_limit(self) -> int:
        return min(self._max_rows, self._slots.size + self._waiting_rows)

    def _admit(self) -> None:
        """Begin waiting rollouts while there is room for a good part of a batch."""
        while self._waiting:
            head = self._settings.group_size - self._waiting[0].next_rollout
            wanted = min(self._waiting_rows, max(head, self._max_rows // 8), self._max_rows)
            if len(self._free) < wanted:
                return
            self._begin(list(self._next_batch()))

    def _next_batch(self) -> Iterator[tuple[_Waiting, int]]:
        """Take waiting requests that go through the model together, with how many rollouts of each begin now."""
        room, prompts, width = len(self._free), 0, len(self._requests[self._waiting[0].request].prompt_ids)
        while self._waiting and room:
            entry = self._waiting[0]
            if prompts and (entry.prefilled is not None or (prompts + 1) * width > PREFILL_TOKENS):
                return
            count = min(room, self._settings.group_size - entry.next_rollout)
            if entry.next_rollout + count == self._settings.group_size:
                self._waiting.popleft()
            room, prompts = room - count, prompts + 1
            yield entry, count
            if entry.prefilled is not None:
                return

    def _begin(self, batch: list[tuple[_Waiting, int]]) -> None:
        """Prefill the prompts of `batch`, draw each rollout's first token, and give a cache row to those that go on."""
        prefilled = batch[0][0].prefilled
        if prefilled is None:
            entries = [entry for entry, count in batch for _ in range(1 if self._prefill_once else count)]
            prefilled = self._prefill([entry.request for entry in entries])
            for row, entry in enumerate(entries if self._prefill_once else ()):
                entry.prefilled, entry.row = prefilled, row
        slots: list[int] = []
        source: list[int] = []
        for entry, count in batch:
            for rollout in range(entry.next_rollout, entry.next_rollout + count):
                slots.append(self._free.pop())
                self._owner[slots[-1]] = (entry.request, rollout)
                source.append(entry.row if self._prefill_once else len(source))
            entry.next_rollout += count
            self._waiting_rows -= count
        new, index = np.array(slots), torch.tensor(source, device=self._device)
        self._prompt[new], self._count[new] = prefilled.lengths[source], 0
        slot = torch.from_numpy(new).to(self._device)
        if self._uniforms is not None:
            length = self._settings.max_new_tokens
            owners = [self._owner[s] for s in slots]
            numbers = np.stack([row_uniforms(self._requests[i].seed, rollout, length) for i, rollout in owners])
            self._uniforms[slot] = torch.from_numpy(numbers).to(self._device)
        stopped = self._draw(prefilled.logits[index], slot, torch.zeros_like(slot), new)
        finished = stopped | (self._settings.max_new_tokens == 1)
        if finished.any():
            self._collect(new[finished], stopped[finished])
            self._release(new[finished])
        if not finished.all():
            going = torch.from_numpy(np.flatnonzero(~finished)).to(self._device)
            self._slots = np.concatenate([self._slots, new[~finished]])
            seen = torch.from_numpy(self._prompt[new[~finished]]).to(self._device)
            self._rows = torch.cat([self._rows, torch.stack([slot[going], seen, torch.ones_like(seen)])], dim=1)
            longest = int(self._prompt[new[~finished]].max())
            self._cache.add(prefilled.cache, index[going], longest, self._row_limit())

    def _prefill(self, requests: list[int]) -> _Prefilled:
        prompts = [self._requests[i].prompt_ids for i in requests]
        lengths = np.array([len(p) for p in prompts])
        width = int(lengths.max())
        ids = np.full((len(prompts), width), self._pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        positions = np.arange(width) - (width - lengths)[:, None]
        inputs = [torch.from_numpy(x).to(self._device) for x in (ids, positions >= 0, positions.clip(min=0))]
        cache = self._new_cache()
        logits = self._forward(inputs[0], inputs[1] if lengths.min() < width else None, inputs[2], cache)
        if cache.get_seq_length() != width:
            got = f"{cache.get_seq_length()} tokens in {type(cache).__name__} after a prompt of {width}"
            raise ModelError(problem("model.sampler: the model did not fill the cache it was given", got=got))
        return _Prefilled(cache=cache, logits=logits, lengths=lengths)
