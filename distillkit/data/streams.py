"""Which prompts come when: the endless training stream and the batches of an evaluation set."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset

from distillkit.data.prompts import PreparedPrompt
from distillkit.data.sources import DataSource
from distillkit.errors import ConfigError, problem

__all__ = ["EvalBatch", "EvalBatches", "EvalSet", "PromptBatch", "PromptStream", "check_share"]


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """One rank's prompts of one step.

    The stream counts prompts over all ranks and epochs. `cursor` and `next_cursor` bound the step: a run that has
    trained this batch continues at `next_cursor`, however many batches were fetched ahead. `offset` is the stream
    position of the first prompt here, so `offset + i` names prompt i over all ranks and steps.
    """

    prompts: tuple[PreparedPrompt, ...]
    cursor: int
    next_cursor: int
    offset: int

    def __len__(self) -> int:
        return len(self.prompts)


class PromptStream(IterableDataset[PromptBatch]):
    """Every prompt once an epoch, for ever: a pure function of the cursor.

    Epoch e is the permutation that (seed, e) determines, or the order of the data; a step takes the next
    `prompts_per_step` of the endless sequence (past the end of an epoch, too), and each rank its contiguous share of
    them.

    Args:
        prompts: at least one.
        prompts_per_step: over all ranks; a multiple of `world_size`.
        seed: of the permutations.
        rank: of this process.
        world_size: how many share a step.
        start_cursor: where the next iteration begins; read when it begins.
        shuffle: False keeps the order of the data.

    Raises:
        ConfigError: no prompts, or a step that the ranks cannot share equally.

    Example:
        >>> stream = PromptStream(["a", "b", "c"], prompts_per_step=2, seed=0, shuffle=False)
        >>> steps = iter(stream)
        >>> [next(steps).prompts for _ in range(3)]
        [('a', 'b'), ('c', 'a'), ('b', 'c')]
    """

    def __init__(
        self,
        prompts: Sequence[PreparedPrompt],
        *,
        prompts_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_cursor: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not prompts:
            raise ConfigError(problem("data.train: no prompts", got=0, expected="at least one"))
        check_share(prompts_per_step, world_size)
        self.prompts = prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.start_cursor = start_cursor
        self.shuffle = shuffle
        self._known: tuple[int, Sequence[int]] = (-1, ())

    def __iter__(self) -> Iterator[PromptBatch]:
        cursor = self.start_cursor
        while True:
            batch = self.at(cursor)
            yield batch
            cursor = batch.next_cursor

    def at(self, cursor: int) -> PromptBatch:
        """Return the batch that begins at `cursor`."""
        share = self.prompts_per_step // self.world_size
        offset = cursor + self.rank * share
        chosen = [
            self.prompts[self._order(position // len(self.prompts))[position % len(self.prompts)]]
            for position in range(offset, offset + share)
        ]
        next_cursor = cursor + self.prompts_per_step
        return PromptBatch(prompts=tuple(chosen), cursor=cursor, next_cursor=next_cursor, offset=offset)

    def state_dict(self) -> dict[str, int]:
        """Return nothing: what was fetched is not what was trained, so the training loop keeps `next_cursor`."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Ignore `state`: `start_cursor` says where to begin."""

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.prompts))
        if self._known[0] == epoch:
            return self._known[1]
        generator = torch.Generator().manual_seed(_seed("epoch", self.seed, epoch))
        self._known = epoch, torch.randperm(len(self.prompts), generator=generator).tolist()
        return self._known[1]


def check_share(prompts_per_step: int, world_size: int) -> None:
    """Refuse a step that the ranks cannot share equally."""
    if prompts_per_step < 1 or prompts_per_step % world_size:
        below = prompts_per_step // world_size * world_size
        raise ConfigError(
            problem(
                "data.prompts_per_step: cannot be shared equally by the ranks",
                got=f"{prompts_per_step} prompts, {world_size} ranks",
                expected=f"a multiple of {world_size}",
                hint=f"{below} or {below + world_size}" if below > 0 else str(world_size),
            )
        )


def _seed(*parts: str | int) -> int:
    """A 63-bit seed that any change in `parts` changes altogether."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A set of problems and how it is answered.

    Attributes:
        name: in metric names (`val/<name>/pass@1`) and in `eval/<name>.jsonl`.
        source: the problems.
        k: completions per problem.
        temperature: 0 is greedy.
        top_p: nucleus.
        max_new_tokens: longest completion, in tokens; the sampler's own by default.
        ks: the k's of `pass@k`, none above `k`; 1 and `k` by default.
        problems_per_batch: sampled together, on each rank.
        gold: the column that is saved as the gold answer.
    """

    name: str
    source: DataSource
    k: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    ks: list[int] | None = None
    problems_per_batch: int = 16
    gold: str = "answer"

    @property
    def pass_ks(self) -> tuple[int, ...]:
        """The k's of `pass@k`, ascending."""
        return tuple(sorted(set(self.ks if self.ks is not None else (1, self.k))))

    def check(self, where: str) -> None:
        """Refuse settings that cannot work, without reading anything.

        Raises:
            ConfigError: naming the setting.
        """
        limit = self.max_new_tokens
        greedy_hint = f"set {where}.temperature above 0, or {where}.k to 1"
        for name, ok, got, expected, hint in (
            ("name", re.fullmatch(r"[A-Za-z0-9_-]+", self.name), repr(self.name), "letters, digits, _ and -", None),
            ("k", self.k >= 1, self.k, "at least 1", None),
            ("temperature", self.temperature >= 0, self.temperature, "at least 0", None),
            ("k", self.k == 1 or self.temperature > 0, f"{self.k} equal greedy completions", None, greedy_hint),
            ("top_p", 0 < self.top_p <= 1, self.top_p, "0 < top_p <= 1", None),
            ("max_new_tokens", limit is None or limit >= 1, limit, "at least 1, or null", None),
            ("ks", all(1 <= k <= self.k for k in self.pass_ks), self.ks, f"numbers from 1 to k = {self.k}", None),
            ("problems_per_batch", self.problems_per_batch >= 1, self.problems_per_batch, "at least 1", None),
        ):
            if not ok:
                raise ConfigError(problem(f"{where}.{name}", got=got, expected=expected, hint=hint))
        self.source.check(f"{where}.source")


@dataclass(frozen=True, kw_only=True)
class EvalBatch:
    """Some problems of one evaluation set on one rank.

    `valid[i]` is False for a problem that only fills up this rank's share: another rank answers it, and it must not be
    counted here. `set_index` is the position of `eval_set` among the evaluation sets.
    """

    eval_set: EvalSet
    set_index: int
    prompts: tuple[PreparedPrompt, ...]
    valid: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def problem_indices(self) -> tuple[int, ...]:
        """Row of each problem in its source, from 0."""
        return tuple(prompt.index for prompt in self.prompts)


class EvalBatches:
    """One rank's share of an evaluation set: as many batches, of the same sizes, on every rank.

    Rank r takes problems r, r + W, r + 2W, … of W ranks; where the set runs out, problems from its beginning are
    repeated with `valid` False.

    Args:
        prompts: the whole set.
        eval_set: its settings.
        set_index: its position among the evaluation sets.
        rank: of this process.
        world_size: W.

    Example:
        >>> five = EvalSet(name="five", source=DataSource(path="five.jsonl"), problems_per_batch=2)
        >>> [(b.prompts, b.valid) for b in EvalBatches("abcde", five, rank=1, world_size=2)]
        [(('b', 'd'), (True, True)), (('a',), (False,))]
    """

    def __init__(
        self,
        prompts: Sequence[PreparedPrompt],
        eval_set: EvalSet,
        *,
        set_index: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts, self.eval_set, self.set_index = prompts, eval_set, set_index
        share = -(-len(prompts) // world_size)
        self._mine = range(rank, share * world_size, world_size)

    def __len__(self) -> int:
        return -(-len(self._mine) // self.eval_set.problems_per_batch)

    def __iter__(self) -> Iterator[EvalBatch]:
        size, total = self.eval_set.problems_per_batch, len(self.prompts)
        for start in range(0, len(self._mine), size):
            mine = self._mine[start : start + size]
            yield EvalBatch(
                eval_set=self.eval_set,
                set_index=self.set_index,
                prompts=tuple(self.prompts[i % total] for i in mine),
                valid=tuple(i < total for i in mine),
            )
