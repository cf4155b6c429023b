"""From rows to token ids, and which rows are kept."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from distillkit.data.files import Row
from distillkit.data.rows import RowReader
from distillkit.data.sources import DataSource, SourceRows
from distillkit.errors import DataError, problem
from distillkit.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataReport", "PreparedPrompt", "PromptSet", "prepare_prompts"]

_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """One prompt, ready to sample from.

    `prompt_ids` are the token ids that the model sees; `prompt` is the text, or the messages that were rendered; `row`
    the dataset row with our column names added; `index` its position in the source, from 0; `completion_ids` the
    completion's token ids with the end token, None unless completions were asked for.
    """

    prompt_ids: tuple[int, ...]
    prompt: Prompt
    row: Row
    index: int
    completion_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows of one source; lengths are in tokens.

    Example:
        >>> print(DataReport(name="data.train", path="train.jsonl", rows=7473, kept=7470, dropped_too_long=3,
        ...                  dropped_completion_too_long=0, longest_prompt=512, longest_dropped=700))
        data.train: 7,470 of 7,473 rows from train.jsonl; 3 dropped: prompt too long (up to 700 tokens)
    """

    name: str
    path: str
    rows: int
    kept: int
    dropped_too_long: int
    dropped_completion_too_long: int
    longest_prompt: int
    longest_dropped: int

    def __str__(self) -> str:
        text = f"{self.name}: {self.kept:,} of {self.rows:,} rows from {self.path}"
        if self.dropped_too_long:
            text += f"; {self.dropped_too_long:,} dropped: prompt too long (up to {self.longest_dropped:,} tokens)"
        if self.dropped_completion_too_long:
            text += f"; {self.dropped_completion_too_long:,} dropped: completion too long"
        return text


class PromptSet(Sequence[PreparedPrompt]):
    """The kept prompts of a source. Token ids are held as packed arrays; a row is read when it is asked for.

    Attributes:
        rows: the source's rows, dropped ones included, for checks of the whole dataset; `rows.place(i)` names one.
        kept: position in `rows` of each prompt.
        report: what was kept and dropped.
    """

    def __init__(
        self,
        *,
        rows: SourceRows,
        reader: RowReader,
        kept: Sequence[int],
        prompt_ids: Sequence[array[int]],
        completion_ids: Sequence[array[int]] | None,
        report: DataReport,
    ) -> None:
        self.rows, self.kept, self.report = rows, kept, report
        self._reader, self._prompt_ids, self._completion_ids = reader, prompt_ids, completion_ids

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> PreparedPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PreparedPrompt]: ...
    def __getitem__(self, index: int | slice) -> PreparedPrompt | Sequence[PreparedPrompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._reader.row(self.kept[index])
        return PreparedPrompt(
            prompt_ids=tuple(self._prompt_ids[index]),
            prompt=self._reader.prompt(row),
            row=row,
            index=self.kept[index],
            completion_ids=None if self._completion_ids is None else tuple(self._completion_ids[index]),
        )

    def our_rows(self) -> list[Row]:
        """Return every row of the source with our column names added, in order, dropped ones included."""
        return [self._reader.row(i) for i in range(len(self.rows))]

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the data: content of the source, and the token ids of the kept prompts in order."""
        digest = hashlib.sha256()
        for ids in itertools.chain(self._prompt_ids, self._completion_ids or ()):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return {
            "path": self.report.path,
            "rows": self.report.rows,
            "kept": self.report.kept,
            "content": self.rows.sha256,
            "tokens": digest.hexdigest(),
        }


def prepare_prompts(
    rows: SourceRows,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None = None,
    completions: bool = False,
    max_completion_tokens: int | None = None,
    where: str = "data.train",
) -> PromptSet:
    """Turn rows into tokenised prompts.

    Text is tokenised as the tokenizer does by default (with a BOS token where it adds one); a rendered chat prompt gets
    nothing beyond its template. Messages that end with the assistant are continued.

    Args:
        rows: from `read_source`.
        source: how a row becomes a prompt.
        tokenizer: of the student.
        max_prompt_tokens: longer prompts are dropped and counted.
        completions: also tokenise the column `completion` (supervised training); it ends with the end token.
        max_completion_tokens: rows with longer completions are dropped and counted.
        where: YAML path of the source, for messages.

    Raises:
        DataError: a column is missing, a row cannot be a prompt, or no row is left.
    """
    reader = RowReader(rows, source, tokenizer, completions=completions, where=where)
    texts, completion_texts = reader.render_all()
    prompt_ids = _tokenize(tokenizer, texts)
    if empty := {i: "no tokens" for i, ids in enumerate(prompt_ids) if not ids}:
        reader.refuse(empty, "prompt")
    completion_ids = None
    if completions:
        completion_ids = [_closed(ids, tokenizer) for ids in _ids(tokenizer, completion_texts, special=False)]
    long_prompts = _over(prompt_ids, max_prompt_tokens)
    long_completions = _over(completion_ids, max_completion_tokens)
    kept = array("q", (i for i in range(len(rows)) if i not in long_prompts and i not in long_completions))
    if not kept:
        what, limit = ("prompt", max_prompt_tokens) if long_prompts else ("completion", max_completion_tokens)
        lengths = sorted((long_prompts or long_completions).values())
        got = f"{len(rows)} rows, {what}s of {lengths[0]} to {lengths[-1]} tokens"
        hint = f"raise data.max_{what}_tokens"
        raise DataError(
            problem(f"{where}: every row was dropped", got=got, expected=f"at most {limit} tokens", hint=hint)
        )
    report = DataReport(
        name=where,
        path=rows.name,
        rows=len(rows),
        kept=len(kept),
        dropped_too_long=len(long_prompts),
        dropped_completion_too_long=len(long_completions.keys() - long_prompts.keys()),
        longest_prompt=max(len(prompt_ids[i]) for i in kept),
        longest_dropped=max(long_prompts.values(), default=0),
    )
    return PromptSet(
        rows=rows,
        reader=reader,
        kept=kept,
        prompt_ids=[prompt_ids[i] for i in kept],
        completion_ids=None if completion_ids is None else [completion_ids[i] for i in kept],
        report=report,
    )


def _over(sequences: Sequence[array[int]] | None, limit: int | None) -> dict[int, int]:
    """Position -> tokens of the sequences that are over the limit."""
    if sequences is None or limit is None:
        return {}
    return {i: len(ids) for i, ids in enumerate(sequences) if len(ids) > limit}


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, bool]]) -> list[array[int]]:
    result: list[array[int]] = []
    for plain, group in itertools.groupby(texts, key=lambda text: text[1]):
        result += _ids(tokenizer, [text for text, _ in group], special=plain)
    return result


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[array[int]]:
    result: list[array[int]] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        encoded = tokenizer(batch, add_special_tokens=special, return_attention_mask=False, verbose=False)
        result += [array("i", ids) for ids in encoded["input_ids"]]
    return result


def _closed(ids: array[int], tokenizer: PreTrainedTokenizerBase) -> array[int]:
    """End at the last end token, or add one: nothing after it is ever sampled."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return array("i", [*ids, eos])
    return ids[: len(ids) - ids[::-1].index(eos)]
