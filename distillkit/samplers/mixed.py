"""`mixed`: some prompts answered by the student, the others by the dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.errors import ConfigError, DataError, RolloutError, problem
from distillkit.types import Rollout, RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from distillkit.scorer import StudentScorer

__all__ = ["MixedSampler"]


class MixedSampler(RolloutSampler):
    """A fraction λ of the prompts is answered by another sampler, the others by a column of the dataset (GKD).

    Which prompts are the student's follows from each request's seed alone: u < λ with u uniform in [0, 1), whatever the
    batch or the number of ranks. A given completion is tokenised with the student's tokenizer, ends with the end token
    and is cut at `max_new_tokens`; every token of it is learned from. Its behaviour log-probs are NaN and its
    `policy_version` is -1: no weights of this run wrote it.

    The student did not draw those tokens, so only a divergence of whole distributions or of top-k tokens learns from
    them, with `objective: null`; anything else is refused when the run starts. The group size is 1 unless λ is 1: a
    given completion is there once, and copies of it would only cost time. Evaluation is the student's alone.

    See *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes* (GKD), Agarwal et al., 2024,
    https://arxiv.org/abs/2306.13649, algorithm 1 (which draws u once for a whole batch).

    Args:
        sampler: draws the student's completions; its group size, length and temperature hold for the run.
        on_policy_share: λ, from 0 (all given) to 1 (all the student's).
        column: of the dataset, with the text of the given completion.

    Raises:
        ConfigError: λ outside [0, 1], no column, or a group size above 1 with λ below 1.
    """

    on_policy = False

    def __init__(self, *, sampler: RolloutSampler, on_policy_share: float = 0.5, column: str = "completion") -> None:
        super().__init__(
            group_size=sampler.group_size,
            max_new_tokens=sampler.max_new_tokens,
            temperature=sampler.temperature,
            top_p=sampler.top_p,
        )
        if not 0 <= on_policy_share <= 1:
            raise ConfigError(problem("model.sampler.on_policy_share", got=on_policy_share, expected="from 0 to 1"))
        if not column:
            raise ConfigError(problem("model.sampler.column", got=repr(column), expected="a column of the dataset"))
        if on_policy_share < 1 and sampler.group_size > 1:
            where = "model.sampler.sampler.group_size: a prompt has one given completion, not a group of them"
            hint = "model.sampler.sampler.group_size: 1, and as many times the data.prompts_per_step"
            raise ConfigError(problem(where, got=sampler.group_size, expected="1", hint=hint))
        self.sampler = sampler
        self.on_policy_share = on_policy_share
        self.column = column
        self._info: StudentInfo | None = None

    @property
    def evaluator(self) -> RolloutSampler:
        """The student's own sampler."""
        return self.sampler.evaluator

    @property
    def beside_training(self) -> bool:
        """As the student's own sampler."""
        return self.sampler.beside_training

    def break_off(self) -> None:
        self.sampler.break_off()

    def setup(self, student: StudentInfo) -> None:
        self._info = student
        self.sampler.setup(student)

    def teardown(self) -> None:
        self.sampler.teardown()

    def sync(self, student: StudentScorer) -> None:
        self.sampler.sync(student)

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield the given completions, then the student's as they are finished.

        Raises:
            RolloutError: called before `setup`.
            DataError: a row without a completion, whether or not it is its turn; one with tokens that the student does
                not have, or that goes on after an end token.
        """
        if self._info is None:
            raise RolloutError(problem("MixedSampler.sample", got="no student yet", expected="setup(info) before it"))
        mine = [request for request in requests if _uniform(request.seed) < self.on_policy_share]
        drawn = {request.group_id for request in mine}
        if self.on_policy_share < 1:
            texts = {request.group_id: self._text(request) for request in requests}
            for request in requests:
                if request.group_id not in drawn:
                    rollout = self._given(request, texts[request.group_id], self._info)
                    yield RolloutGroup(request=request, rollouts=(rollout,) * request.settings.group_size)
        if mine:
            yield from self.sampler.sample(mine)

    def _text(self, request: SampleRequest) -> str:
        text = request.row.get(self.column)
        if isinstance(text, str) and text.strip():
            return text
        if self.column in request.row:
            what, got = "no completion in this row", repr(text)
            hint = "repair or remove the row"
        else:
            what, got = f"the dataset has no column {self.column!r}", f"columns {', '.join(map(repr, request.row))}"
            hint = f"data.train.columns: {{{self.column}: THEIR_COLUMN}}, or model.sampler.column"
        raise self._bad_row(request, what, got, "a text", hint)

    def _given(self, request: SampleRequest, text: str, student: StudentInfo) -> Rollout:
        tokenizer, ends = student.tokenizer, student.eos_token_ids
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids or ids[-1] not in ends:
            ids.append(ends[0])
        if strange := [token for token in ids if not 0 <= token < student.vocab_limit]:
            expected = f"ids below {student.vocab_limit}, those of student and teacher"
            raise self._bad_row(request, "a token that the models do not share", f"ids {strange[:8]}", expected, None)
        if inner := [token for token in ids[:-1] if token in ends]:
            got = f"{tokenizer.convert_ids_to_tokens(inner[0])!r} before its end"
            raise self._bad_row(request, "the completion goes on after an end token", got, "one, at its end", None)
        tokens = torch.tensor(ids[: request.settings.max_new_tokens])
        stopped = int(tokens[-1]) in ends
        return Rollout(
            completion_ids=tokens,
            behaviour_logprobs=torch.full(tokens.shape, float("nan")),
            loss_mask=torch.ones_like(tokens, dtype=torch.bool),
            policy_version=torch.full_like(tokens, -1),
            finish_reason="stop" if stopped else "length",
            text=str(tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)),
        )

    def _bad_row(self, request: SampleRequest, what: str, got: str, expected: str, hint: str | None) -> DataError:
        shown = repr(request.prompt)
        where = (
            f"data.train, column {self.column!r}, the row of prompt {shown if len(shown) <= 80 else shown[:77] + '...'}"
        )
        return DataError(problem(f"{where}: {what}", got=got, expected=expected, hint=hint))


def _uniform(seed: int) -> float:
    """A number in [0, 1) from a request's seed, apart from those that draw its tokens.

    Example:
        >>> round(sum(_uniform(seed) < 0.3 for seed in range(10_000)) / 10_000, 1)
        0.3
    """
    digest = hashlib.sha256(f"mixed/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
