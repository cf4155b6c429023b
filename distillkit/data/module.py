"""The Lightning data module: prompts to train on, problems to evaluate on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule

from distillkit.data.prompts import DataReport, PromptSet, prepare_prompts
from distillkit.data.sources import DataSource, SourceRows, needs_download, read_source
from distillkit.data.streams import EvalBatches, EvalSet, PromptBatch, PromptStream, check_share
from distillkit.errors import ConfigError, DataError, problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptData"]


class PromptData(LightningDataModule):
    """Reads the sources, prepares prompts with the student's tokenizer, and serves them.

    The training position is not kept here: the training loop saves `next_cursor` of the last batch it trained and sets
    `start_cursor` before it iterates.

    Args:
        train: prompts to train on; may be absent when only evaluating.
        val: evaluation sets, for `validate`, `test` and `predict` too.
        prompts_per_step: prompts of one rollout step, over all ranks.
        max_prompt_tokens: longer prompts are dropped and counted.
        max_completion_tokens: in supervised training, rows with longer completions are dropped and counted.
        seed: of the order of prompts; None takes `seed_everything`'s.
        shuffle: False keeps the order of the data.

    Raises:
        ConfigError: a setting that cannot work.

    Example:
        >>> data = PromptData(train=DataSource(path="prompts.jsonl"), prompts_per_step=8)
        >>> data.prompts_per_step
        8
    """

    def __init__(
        self,
        *,
        train: DataSource | None = None,
        val: list[EvalSet] | None = None,
        prompts_per_step: int = 16,
        max_prompt_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        seed: int | None = None,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = tuple(val or ())
        self.prompts_per_step = prompts_per_step
        self.max_prompt_tokens = max_prompt_tokens
        self.max_completion_tokens = max_completion_tokens
        self.seed = seed
        self.shuffle = shuffle
        self._check()
        self.train_prompts: PromptSet | None = None
        self.val_prompts: tuple[PromptSet, ...] = ()
        self._read: dict[str, SourceRows] = {}
        self._start_cursor = 0
        self._stream: PromptStream | None = None

    def prepare_data(self) -> None:
        """Download hub datasets once, before every rank reads them."""
        named = {"data.train": self.train, **{f"data.val[{i}].source": s.source for i, s in enumerate(self.val)}}
        for where, source in named.items():
            if source is not None and needs_download(source, where):
                self._read_once(where, source)

    def setup(self, stage: str) -> None:
        """Read and prepare what `stage` needs; the tokenizer is the module's `tokenizer`.

        A module whose `needs_completions` is true gets `completion_ids` with its training prompts.
        """
        assert self.trainer is not None, "setup is the trainer's call; use prepare(tokenizer)"
        module: Any = self.trainer.lightning_module
        if stage == "fit":
            check_share(self.prompts_per_step, self.trainer.world_size)
            if not self.val:
                # Lightning takes an empty list of loaders for a loader, and warns that it is empty.
                self.trainer.limit_val_batches = 0
        # Every file is read before the tokenizer is asked for: bad data is reported before a model is loaded.
        for where, source in self._sources(stage):
            self._read_once(where, source)
        self.prepare(module.tokenizer, stage, completions=bool(getattr(module, "needs_completions", False)))

    def prepare(self, tokenizer: PreTrainedTokenizerBase, stage: str = "fit", *, completions: bool = False) -> None:
        """Read and tokenise what `stage` (`fit`, `validate`, `test`, `predict`) needs, with no trainer.

        Raises:
            ConfigError: `stage` has nothing to work on.
            DataError: rows that cannot be read or used; see `read_source` and `prepare_prompts`.
        """
        prepared: dict[str, PromptSet] = {}
        for where, source in self._sources(stage):
            supervised = completions and where == "data.train"
            prepared[where] = prepare_prompts(
                self._read_once(where, source),
                source,
                tokenizer,
                max_prompt_tokens=self.max_prompt_tokens,
                completions=supervised,
                max_completion_tokens=self.max_completion_tokens if supervised else None,
                where=where,
            )
        self.train_prompts = prepared.pop("data.train", None)
        self.val_prompts = tuple(prepared.values())

    @property
    def reports(self) -> tuple[DataReport, ...]:
        """Rows kept and dropped of each source that is set up, training first."""
        return tuple(replace(prompts.report, name=name) for name, prompts in self._prepared())

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return, per source that is set up, hashes of its content and of its prompts' token ids."""
        return {where: prompts.fingerprint() for where, prompts in self._prepared()}

    def check_fingerprint(self, saved: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        """Compare with the data of the run that is resumed and return the evaluation sets that are not the same.

        Raises:
            DataError: the training prompts changed, so that the saved position means other prompts.
        """
        changed = []
        for where, now in self.fingerprint().items():
            then = saved.get(where)
            if then is None or all(then.get(key) == now[key] for key in ("content", "tokens")):
                continue
            if where == "data.train":
                content = "its rows" if then.get("content") != now["content"] else "its tokens (template or tokenizer)"
                got = f"{now['path']}: {now['kept']} prompts, {content} changed"
                expected = f"{then.get('path')}: {then.get('kept')} prompts, content {str(then.get('content'))[:12]}"
                hint = "restore the data, or start a new run from the exported student"
                raise DataError(
                    problem(f"{where}: not the data of the resumed run", got=got, expected=expected, hint=hint)
                )
            changed.append(where)
        return tuple(changed)

    @property
    def start_cursor(self) -> int:
        """The stream position where the next pass over the training prompts begins."""
        return self._start_cursor

    @start_cursor.setter
    def start_cursor(self, cursor: int) -> None:
        self._start_cursor = cursor
        if self._stream is not None:
            self._stream.start_cursor = cursor

    def train_dataloader(self) -> PromptStream:
        """Return the endless stream of this rank's `PromptBatch`es.

        The stream itself is the loader: a `DataLoader` around it would draw from the global random state at every
        start.
        """
        assert self.train_prompts is not None
        rank, world_size = self._rank()
        self._stream = PromptStream(
            self.train_prompts,
            prompts_per_step=self.prompts_per_step,
            seed=self._seed(),
            rank=rank,
            world_size=world_size,
            start_cursor=self._start_cursor,
            shuffle=self.shuffle,
        )
        return self._stream

    def after(self, batch: PromptBatch) -> PromptBatch:
        """Return this rank's prompts of the step that follows `batch`."""
        assert self._stream is not None
        return self._stream.at(batch.next_cursor)

    def val_dataloader(self) -> list[EvalBatches]:
        """Return this rank's `EvalBatch`es of every evaluation set."""
        rank, world_size = self._rank()
        return [
            EvalBatches(prompts, eval_set, set_index=i, rank=rank, world_size=world_size)
            for i, (eval_set, prompts) in enumerate(zip(self.val, self.val_prompts, strict=True))
        ]

    def test_dataloader(self) -> list[EvalBatches]:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[EvalBatches]:
        """Return the same as `val_dataloader`."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches as they are: they hold no tensors, and Lightning refuses frozen dataclasses."""
        return batch

    def _check(self) -> None:
        for name in ("prompts_per_step", "max_prompt_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(problem(f"data.{name}", got=value, expected="at least 1"))
        if self.train is not None:
            self.train.check("data.train")
        for i, eval_set in enumerate(self.val):
            eval_set.check(f"data.val[{i}]")
        names = [eval_set.name for eval_set in self.val]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            got = ", ".join(twice)
            raise ConfigError(
                problem("data.val: a name is used twice", got=got, expected="one name per evaluation set")
            )

    def _sources(self, stage: str) -> Iterator[tuple[str, DataSource]]:
        if stage == "fit":
            if self.train is None:
                hint = "data.train: {path: prompts.jsonl}"
                raise ConfigError(
                    problem("data.train: nothing to train on", got="null", expected="a source", hint=hint)
                )
            yield "data.train", self.train
        elif not self.val:
            hint = "data.val: [{name: test, source: {path: test.jsonl}}]"
            raise ConfigError(problem(f"data.val: {stage} has no evaluation set", got="none", hint=hint))
        for i, eval_set in enumerate(self.val):
            yield f"data.val[{i}].source", eval_set.source

    def _read_once(self, where: str, source: DataSource) -> SourceRows:
        if where not in self._read:
            self._read[where] = read_source(source, where)
        return self._read[where]

    def _prepared(self) -> list[tuple[str, PromptSet]]:
        named = [(f"data.val.{s.name}", p) for s, p in zip(self.val, self.val_prompts, strict=False)]
        return [("data.train", self.train_prompts), *named] if self.train_prompts is not None else named

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _seed(self) -> int:
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
