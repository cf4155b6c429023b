"""`replay`: recorded completions instead of sampling."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.errors import ConfigError, DataError, RolloutError, problem
from distillkit.types import Rollout, RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from distillkit.scorer import StudentScorer

__all__ = ["ReplaySampler"]


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One line of the file: texts or token ids, log-probs beside the ids if they were recorded."""

    line: int
    texts: tuple[str, ...] | None
    ids: tuple[tuple[int, ...], ...] | None
    logprobs: tuple[tuple[float, ...], ...] | None

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.ids or ())


class ReplaySampler(RolloutSampler):
    """Answers each prompt with completions recorded in a JSONL file, the first `group_size` of its record.

    One JSON object per line and prompt, in any order; other fields (labels, say) are ignored:

    | field | value |
    |---|---|
    | the `key` field | `key: prompt`: the prompt's text or chat messages as the dataset has them; another `key`: the |
    | | value of that column of the dataset row |
    | `completions` | list of texts, tokenised with the student's tokenizer, an end token appended |
    | `completion_ids` | or lists of token ids, taken as they are |
    | `logprobs` | with `completion_ids`, optional: log-probs in nats at the temperature of the recording |

    ```
    {"prompt": "1+1=", "completions": ["2", "3"], "label": [1, 0]}
    {"prompt": "2+2=", "completion_ids": [[21, 1], [22, 1]], "logprobs": [[-0.1, -0.2], [-2.5, -0.1]]}
    ```

    A completion longer than `max_new_tokens` is cut there; it counts as truncated, as does one without an end token.
    Behaviour log-probs are NaN where none are recorded; `policy_version` is -1: no weights of this run.

    Args:
        path: the JSONL file.
        key: field of the records, and `prompt` or a column of the dataset rows, that match them.
        append_eos: end each text with the student's end token unless it ends with one.
        group_size: G, completions per prompt; a record needs at least as many.
        max_new_tokens: longest completion, in tokens.
        temperature: of the recording, for the importance ratio.
        top_p: of the recording.
    """

    def __init__(
        self,
        *,
        path: str,
        key: str = "prompt",
        append_eos: bool = True,
        group_size: int = 8,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        for name, value in (("path", path), ("key", key)):
            if not value:
                raise ConfigError(problem(f"model.sampler.{name}", got=repr(value), expected="a non-empty text"))
        self.path = path
        self.key = key
        self.append_eos = append_eos
        self._info: StudentInfo | None = None
        self._records: dict[str, _Record] = {}

    def setup(self, student: StudentInfo) -> None:
        """Read the file.

        Raises:
            DataError: no such file, a line that is not a record, two records of one prompt; names file and line.
        """
        self._info = student
        self._records = {}
        try:
            lines = Path(self.path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            expected = "a UTF-8 JSONL file of recorded completions"
            raise DataError(
                problem("model.sampler.path: cannot read it", got=f"{self.path} ({error})", expected=expected)
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            identity, record = self._parse(number, line)
            if identity in self._records:
                first = self._records[identity].line
                hint = "one line per prompt, with all its completions"
                raise self._bad_line(number, f"the same {self.key!r} as line {first}", identity[:80], None, hint)
            self._records[identity] = record
        if not self._records:
            raise DataError(problem(f"{self.path}: no record", expected="at least one line", hint=self._example()))

    def sync(self, student: StudentScorer) -> None:
        """Nothing to take over: the completions are recorded."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield the recorded completions of each request, in order.

        Raises:
            RolloutError: called before `setup`; a prompt without a record, or with fewer completions than wanted.
            DataError: a completion that is empty, or has ids that the student does not have.
        """
        if self._info is None:
            raise RolloutError(problem("ReplaySampler.sample", got="no records yet", expected="setup(info) before it"))
        records = [self._find(request) for request in requests]
        for request, record in zip(requests, records, strict=True):
            rollouts = tuple(self._rollout(record, i, request) for i in range(request.settings.group_size))
            yield RolloutGroup(request=request, rollouts=rollouts)

    def _find(self, request: SampleRequest) -> _Record:
        where = f"{self.path}: group {request.group_id}"
        if self.key == "prompt":
            value: Any = request.prompt
        elif self.key in request.row:
            value = request.row[self.key]
        else:
            columns = ", ".join(map(repr, request.row)) or "none"
            raise RolloutError(
                problem(
                    f"{where}: the dataset row has no column {self.key!r}",
                    got=f"columns {columns}",
                    hint="model.sampler.key: a column of the dataset, or prompt",
                )
            )
        identity = _identity(value)
        record = self._records.get(identity)
        if record is None:
            raise RolloutError(
                problem(
                    f"{where}: no recorded completions for this prompt",
                    got=f"{self.key} = {identity[:200]}",
                    expected=f"one of the {len(self._records)} records' {self.key!r}",
                    hint="record it, or set model.sampler.key to a column that both files share",
                )
            )
        wanted = request.settings.group_size
        if len(record) < wanted:
            raise RolloutError(
                problem(
                    f"{self.path}, line {record.line}: too few completions",
                    got=len(record),
                    expected=f"at least {wanted} (the group size)",
                    hint=f"model.sampler.group_size: {len(record)}",
                )
            )
        return record

    def _rollout(self, record: _Record, i: int, request: SampleRequest) -> Rollout:
        info = self._info
        assert info is not None
        if record.texts is not None:
            ids = list(info.tokenizer(record.texts[i], add_special_tokens=False)["input_ids"])
            bare = not (ids and ids[-1] in info.eos_token_ids)
            if bare and self.append_eos:
                ids.append(info.eos_token_ids[0])
        else:
            assert record.ids is not None
            ids, bare = list(record.ids[i]), False
        if not ids:
            hint = "leave it out, or model.sampler.append_eos: true"
            raise self._bad_line(record.line, f"completion {i} has no token", None, "at least one token", hint)
        strange = [t for t in ids if not 0 <= t < info.vocab_limit]
        if strange:
            expected = f"ids from 0 to {info.vocab_limit - 1}, those of the student"
            raise self._bad_line(record.line, f"completion {i} has unknown token ids", strange[:8], expected, None)
        inner = [t for t in ids[:-1] if t in info.eos_token_ids]
        if inner:
            what = f"completion {i} goes on after an end token"
            raise self._bad_line(record.line, what, f"id {inner[0]}", "an end token at its end only", None)
        limit = request.settings.max_new_tokens
        cut, ids = len(ids) > limit, ids[:limit]
        stopped = ids[-1] in info.eos_token_ids
        if bare and not cut and record.texts is not None:
            text = record.texts[i]
        else:
            decoded = info.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
            assert isinstance(decoded, str)
            text = decoded
        tokens = torch.tensor(ids)
        recorded = None if record.logprobs is None else torch.tensor(record.logprobs[i][:limit])
        return Rollout(
            completion_ids=tokens,
            behaviour_logprobs=torch.full(tokens.shape, float("nan")) if recorded is None else recorded,
            loss_mask=torch.ones_like(tokens, dtype=torch.bool),
            policy_version=torch.full_like(tokens, -1),
            finish_reason="stop" if stopped else "length",
            text=text,
        )

    def _parse(self, number: int, line: str) -> tuple[str, _Record]:
        try:
            data = json.loads(line)
        except ValueError as error:
            raise self._bad_line(number, f"not JSON ({error})", line[:80], None, self._example()) from error
        if not isinstance(data, dict) or self.key not in data:
            got = f"fields {', '.join(map(repr, data))}" if isinstance(data, dict) else type(data).__name__
            raise self._bad_line(number, "no prompt to match", got, f"an object with {self.key!r}", self._example())
        texts, ids, logprobs = (data.get(name) for name in ("completions", "completion_ids", "logprobs"))
        if (texts is None) == (ids is None):
            got = "neither" if texts is None else "both"
            raise self._bad_line(number, "one kind of completions", got, "completions or completion_ids", None)
        if texts is not None and not (isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            raise self._bad_line(number, "'completions'", _short(texts), "a list of texts", self._example())
        if ids is not None and not _is_table(ids, int):
            raise self._bad_line(number, "'completion_ids'", _short(ids), "a list of lists of token ids", None)
        if logprobs is not None:
            lengths = None if ids is None else [len(row) for row in ids]
            if not _is_table(logprobs, float) or [len(row) for row in logprobs] != lengths:
                expected = "lists of numbers, one per token of completion_ids"
                raise self._bad_line(number, "'logprobs'", _short(logprobs), expected, None)
        return _identity(data[self.key]), _Record(
            line=number,
            texts=None if texts is None else tuple(texts),
            ids=None if ids is None else tuple(map(tuple, ids)),
            logprobs=None if logprobs is None else tuple(tuple(map(float, row)) for row in logprobs),
        )

    def _bad_line(self, number: int, what: str, got: object, expected: object, hint: str | None) -> DataError:
        return DataError(problem(f"{self.path}, line {number}: {what}", got=got, expected=expected, hint=hint))

    def _example(self) -> str:
        return json.dumps({self.key: "1+1=", "completions": ["2", "3"]})


def _identity(value: Any) -> str:
    """A text as it is; anything else (messages, numbers) as canonical JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, Sequence) else str(value)


def _is_table(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else (kind,)
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(x, kinds) and not isinstance(x, bool) for x in row) for row in value
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
