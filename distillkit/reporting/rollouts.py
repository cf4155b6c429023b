"""`rollouts/step-000012.jsonl`: what was sampled at a step, and what was made of each token.

Written from a `StepOutput`, read back as `RecordedRollout`s. The schema is in `docs/run_folder.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillkit.errors import DataError, ShapeError, problem
from distillkit.reporting.files import shortest, write_atomically
from distillkit.types import CORRECT, UNKNOWN, Prompt, RewardOutput, StepOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PER_TOKEN",
    "SCHEMA_VERSION",
    "RecordedRollout",
    "read_rollouts",
    "rollout_files",
    "token_texts",
    "write_rollouts",
]

SCHEMA_VERSION = 1

PER_TOKEN = (
    "student_logprobs",
    "distil_logprobs",
    "old_logprobs",
    "behaviour_logprobs",
    "teacher_logprobs",
    "reference_logprobs",
    "distil_weight",
    "policy_weight",
    "divergence",
    "advantages",
)
"""Per-token values that a rollout file may have, in its order; those that a step does not compute are absent."""

_STUDENT = ("distil_logprobs", "student_logprobs", "old_logprobs", "behaviour_logprobs")
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, kw_only=True)
class RecordedRollout:
    """One line of a rollout file; `docs/run_folder.md` says what each field means.

    `token_texts`, `token_ids`, `sampled` and every entry of `per_token` have one item per completion token; None is
    "not computed". Log-probabilities and `divergence` are in nats.
    """

    step: int
    group_id: int
    prompt: Prompt
    gold: Any
    text: str
    finish_reason: str
    rewards: Mapping[str, float | None]
    status: Mapping[str, str]
    total: float | None
    correct: bool | None
    answer: str | None
    advantage: float | None
    token_texts: tuple[str, ...]
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    per_token: Mapping[str, tuple[float | None, ...]]

    @property
    def log_ratios(self) -> tuple[float | None, ...]:
        """The d = log π_T - log π_θ of each token, nats: negative where the teacher finds the token less likely.

        The student's log-prob is the update's where the token was in one, else the one at sampling time (old policy,
        then behaviour). None without a teacher's or any student's.
        """
        nothing = (None,) * len(self.token_ids)
        teacher = self.per_token.get("teacher_logprobs", nothing)
        students = zip(*(self.per_token.get(name, nothing) for name in _STUDENT), strict=True)
        student = (next((s for s in known if s is not None), None) for known in students)
        return tuple(None if t is None or s is None else t - s for t, s in zip(teacher, student, strict=True))

    @property
    def mean_log_ratio(self) -> float | None:
        """Mean of `log_ratios` over the tokens that have one, nats/token: the gap; minus it estimates KL(π_θ‖π_T)."""
        known = [d for d in self.log_ratios if d is not None]
        return sum(known) / len(known) if known else None


def write_rollouts(
    folder: str | Path,
    output: StepOutput,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    *,
    limit: int | None = None,
    rank: int = 0,
    gold_column: str = "answer",
) -> Path:
    """Write the rollouts of one step to `<folder>/step-<step>.jsonl`, atomically, one strict JSON object per line.

    Args:
        folder: `<run>/rollouts`.
        output: what the step did; NaN in `per_token` is "not computed" and becomes null.
        tokenizer: gives the tokens their texts.
        step: the rollout step, from 1.
        limit: at most so many rollouts, the first ones; None writes all.
        rank: ranks above 0 write beside it, `step-<step>-rank<rank>.jsonl`.
        gold_column: the column of the dataset row that holds the gold answer.

    Raises:
        ShapeError: a `per_token` tensor is not [N, L].
    """
    rollouts = output.rollouts
    for name, values in output.per_token.items():
        if values.shape != rollouts.tokens.shape:
            where, want = f"StepOutput.per_token[{name!r}]", tuple(rollouts.tokens.shape)
            raise ShapeError(problem(where, got=tuple(values.shape), expected=f"{want}, rollouts x tokens"))
    recorded = {**output.per_token, "behaviour_logprobs": rollouts.behaviour_logprobs}
    per_token = {
        name: values.detach().float().masked_fill(~rollouts.loss_mask, math.nan).cpu()
        for name, values in recorded.items()
    }
    names = [name for name in PER_TOKEN if name in per_token] + sorted(set(per_token) - set(PER_TOKEN))
    totals = [] if output.rewards is None else _numbers(output.rewards.total)
    count = len(rollouts) if limit is None else min(limit, len(rollouts))
    texts = _texts_by_id(sorted(set(rollouts.tokens[:count].flatten().tolist())), tokenizer)
    lines = []
    for i in range(count):
        span = slice(int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i]))
        ids = rollouts.tokens[i, span].tolist()
        sampled = rollouts.loss_mask[i, span].cpu()
        tokens = {"text": [texts[t] for t in ids], "id": ids, "sampled": sampled.tolist()}
        record = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "group_id": int(rollouts.group_id[i]),
            "prompt": _plain(rollouts.prompts[i]),
            "gold": _plain(rollouts.rows[i].get(gold_column)),
            "text": rollouts.texts[i],
            "finish_reason": rollouts.finish_reason[i],
            **_reward_fields(output.rewards, totals, i),
            "advantage": _mean(per_token.get("advantages"), i, span, sampled),
            "tokens": {**tokens, **{name: _numbers(per_token[name][i, span]) for name in names}},
        }
        lines.append(_dump(record) + "\n")
    suffix = f"-rank{rank}" if rank else ""
    path = Path(folder) / f"step-{step:06d}{suffix}.jsonl"
    write_atomically(path, "".join(lines).encode())
    return path


def rollout_files(folder: str | Path) -> dict[int, tuple[Path, ...]]:
    """Return the rollout files in `folder` by step, in step order, each step's by rank."""
    found: dict[int, list[Path]] = {}
    for path in sorted(Path(folder).glob("step-*.jsonl"), key=lambda p: (len(p.name), p.name)):
        number = path.name.removeprefix("step-").removesuffix(".jsonl").split("-rank")[0]
        if number.isdecimal():
            found.setdefault(int(number), []).append(path)
    return {step: tuple(found[step]) for step in sorted(found)}


def read_rollouts(path: str | Path) -> list[RecordedRollout]:
    """Return the rollouts of one file.

    Raises:
        DataError: no such file, another schema version, or a line that does not follow the schema (file, line, got,
            expected).
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(problem(f"{file}: no such file", expected="a rollouts/step-<step>.jsonl of a run"))
    with file.open("rb") as lines:
        return [_record(f"{file}:{number}", line.removesuffix(b"\n")) for number, line in enumerate(lines, start=1)]


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token, decoded on its own, special tokens by name, leading spaces kept.

    A character that a byte-level tokenizer split over several tokens shows as `�` in each; `text` of the rollout has it
    whole. An id without text (a padded vocabulary's) is `<id 151999>`.
    """
    texts = _texts_by_id(sorted(set(ids)), tokenizer)
    return [texts[i] for i in ids]


def _texts_by_id(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    texts, size = {}, len(tokenizer)
    for i in ids:
        text = str(tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        piece = tokenizer.convert_ids_to_tokens(i) if i < size else None
        if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
            text = " " + text  # sentencepiece decoders strip the space of what they take for the first word
        texts[i] = text or f"<id {i}>"
    return texts


def _reward_fields(rewards: RewardOutput | None, totals: list[float | None], i: int) -> dict[str, Any]:
    if rewards is None:
        return {"rewards": {}, "status": {}, "total": None, "correct": None, "answer": None}
    correct = int(rewards.correct[i])
    return {
        "rewards": dict(zip(rewards.names, _numbers(rewards.values[i]), strict=True)),
        "status": {name: status[i] for name, status in zip(rewards.names, rewards.status, strict=True)},
        "total": totals[i],
        "correct": None if correct == UNKNOWN else correct == CORRECT,
        "answer": rewards.answers[i],
    }


def _numbers(values: Tensor) -> list[float | None]:
    """NaN -> None; an infinity, which JSON does not have, -> the largest float32 of its sign."""
    return [
        None if math.isnan(v) else max(-_LARGEST, min(_LARGEST, v)) for v in shortest(values.detach().float().tolist())
    ]


def _mean(values: Tensor | None, i: int, span: slice, sampled: Tensor) -> float | None:
    known = torch.empty(0) if values is None else values[i, span][sampled]
    known = known[~known.isnan()]
    return _numbers(known.mean(dim=0, keepdim=True))[0] if len(known) else None


def _plain(value: Any) -> Any:
    """What JSON can hold: a dataset row may have dates, decimals, NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _dump(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a dataset row
        return json.dumps(record, allow_nan=False)
    return text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("an integer from 0", _is_count),
    "group_id": ("an integer from 0", _is_count),
    "prompt": ("text or a list of messages", lambda v: isinstance(v, str | list)),
    "gold": ("anything", lambda v: True),
    "text": ("text", lambda v: isinstance(v, str)),
    "finish_reason": ("'stop' or 'length'", lambda v: v in ("stop", "length")),
    "rewards": (
        "name -> number or null",
        lambda v: isinstance(v, dict) and all(x is None or _is_number(x) for x in v.values()),
    ),
    "status": ("name -> text", lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values())),
    "total": ("a number or null", lambda v: v is None or _is_number(v)),
    "correct": ("true, false or null", lambda v: v is None or isinstance(v, bool)),
    "answer": ("text or null", lambda v: v is None or isinstance(v, str)),
    "advantage": ("a number or null", lambda v: v is None or _is_number(v)),
    "tokens": ("an object with text, id, sampled", lambda v: isinstance(v, dict) and set(_TOKEN_FIELDS) <= set(v)),
}

_TOKEN_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("texts", lambda v: isinstance(v, str)),
    "id": ("integers from 0", _is_count),
    "sampled": ("true or false", lambda v: isinstance(v, bool)),
}


def _value(number: float | None) -> float | None:
    return number if number is None or abs(number) < _LARGEST else math.copysign(math.inf, number)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _record(where: str, line: bytes) -> RecordedRollout:
    try:
        data = json.loads(line, parse_constant=_no_constant)
    except ValueError as error:
        raise DataError(problem(f"{where}: no JSON", got=str(error), expected="one JSON object per line")) from None
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        got = repr(data.get("schema_version")) if isinstance(data, dict) else type(data).__name__
        hint = "the distillkit that wrote the file; docs/run_folder.md describes version 1"
        raise DataError(problem(f"{where}: schema_version", got=got, expected=SCHEMA_VERSION, hint=hint))
    for name, (expected, fits) in _FIELDS.items():
        if name not in data or not fits(data[name]):
            got = repr(data[name])[:200] if name in data else "nothing"
            raise DataError(problem(f"{where}: {name}", got=got, expected=expected))
    tokens = data["tokens"]
    for name, values in tokens.items():
        expected, fits = _TOKEN_FIELDS.get(name, ("numbers or null", lambda v: v is None or _is_number(v)))
        if not isinstance(values, list) or not all(fits(value) for value in values):
            got = repr(values)[:200]
            raise DataError(problem(f"{where}: tokens.{name}", got=got, expected=f"a list of {expected}"))
    for name, values in tokens.items():
        if len(values) != len(tokens["id"]):
            got, count = f"{len(values)} entries", len(tokens["id"])
            raise DataError(problem(f"{where}: tokens.{name}", got=got, expected=f"{count}, one per token"))
    return RecordedRollout(
        **{name: data[name] for name in _FIELDS if name != "tokens"},
        token_texts=tuple(tokens["text"]),
        token_ids=tuple(tokens["id"]),
        sampled=tuple(tokens["sampled"]),
        per_token={name: tuple(map(_value, values)) for name, values in tokens.items() if name not in _TOKEN_FIELDS},
    )
