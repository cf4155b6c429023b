"""What flows through a step: frozen dataclasses, one per stage.

Axes, the same letters everywhere: **P** prompts, **G** rollouts per prompt, **N = P·G** rollouts, **L** prompt +
completion tokens, **T** completion tokens, **V** vocabulary, **K** teacher top-k, **H** hidden, **R** rewards,
**M** scored token positions of a chunk.

Position *t* of a per-token tensor belongs to the token *at t* (not to the next one). Log-probabilities are float32 and
natural (nats). Masks are bool. Rollouts are right-padded. Nothing here is edited in place.

In the order of the step: `SamplingSettings`, `SampleRequest`, `Rollout`, `RolloutGroup`, `RolloutBatch`,
`RewardOutput`, `ScoreRequest`, `TokenScores`, `TeacherScores`, `StudentScores`, `TokenWeights`, `StepOutput`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distillkit.errors import ShapeError, problem

__all__ = [
    "CORRECT",
    "NOT_A_SCORE",
    "UNKNOWN",
    "WRONG",
    "FinishReason",
    "Prompt",
    "RewardOutput",
    "RewardStatus",
    "Rollout",
    "RolloutBatch",
    "RolloutGroup",
    "SampleRequest",
    "SamplingSettings",
    "ScoreRequest",
    "StepOutput",
    "StudentScores",
    "TeacherScores",
    "TokenScores",
    "TokenWeights",
]

FinishReason = Literal["stop", "length"]
"""`stop`: the policy emitted an end token; `length`: cut at `max_new_tokens` (truncated)."""

Prompt = str | Sequence[Mapping[str, Any]]
"""A prompt as the dataset has it: text, or chat messages."""

CORRECT, WRONG, UNKNOWN = 1, 0, -1
"""Values of `RewardOutput.correct`. Unknown is not wrong."""

RewardStatus = Literal["scored", "unparseable", "not_applicable", "timed_out", "crashed", "undecided"]
"""How one reward value came about.

`scored`: compared and valued. `unparseable`: no answer was found in the completion; that is a wrong answer, value 0.
`not_applicable`: the reward does not concern this rollout (a TRL function returned None): NaN, left out of the sum.
`timed_out`, `crashed`, `undecided` (a model that takes traces apart or judges gave nothing that can be used): it could
not be scored: NaN, and the whole rollout is left out of its group.
"""

NOT_A_SCORE: frozenset[str] = frozenset({"timed_out", "crashed", "undecided"})
"""Statuses after which a rollout has no reward at all, whatever its other rewards say."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn: `group_size` G, `max_new_tokens` (tokens), `temperature` (0 is greedy), `top_p`."""

    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One prompt to sample G completions for.

    `row` is the dataset row (gold answer, teacher trace, further columns). `group_id` is unique within the step and
    over all ranks. `seed` determines the group's random draws; `policy_version` is the update count of the sampling
    weights.
    """

    prompt_ids: tuple[int, ...]
    prompt: Prompt
    row: Mapping[str, Any]
    group_id: int
    seed: int
    settings: SamplingSettings
    policy_version: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One completion, unpadded.

    `completion_ids` [T] int64 with the end token when there is one; `behaviour_logprobs` [T] float32 at the sampling
    temperature (NaN where the engine's are unknown); `loss_mask` [T] bool, True on tokens that the student sampled
    (tool and observation tokens are attended, not trained); `policy_version` [T] int64.
    """

    completion_ids: Tensor
    behaviour_logprobs: Tensor
    loss_mask: Tensor
    policy_version: Tensor
    finish_reason: FinishReason
    text: str

    def __post_init__(self) -> None:
        for name in ("behaviour_logprobs", "loss_mask", "policy_version"):
            if getattr(self, name).shape != self.completion_ids.shape:
                got, want = tuple(getattr(self, name).shape), tuple(self.completion_ids.shape)
                raise ShapeError(
                    problem(f"Rollout.{name}", got=got, expected=f"{want}, one entry per completion token")
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutGroup:
    """The G rollouts of one request, as the sampler finishes them."""

    request: SampleRequest
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutBatch:
    """Rollouts of several groups, right-padded to a common length L.

    | field | shape, dtype | meaning |
    |---|---|---|
    | `tokens` | [N, L] int64 | prompt, then completion, then padding |
    | `attention_mask` | [N, L] bool | False on padding |
    | `loss_mask` | [N, L] bool | True on tokens sampled by the student (end token included) |
    | `behaviour_logprobs` | [N, L] float32 | under the sampling policy, at its temperature; 0 off `loss_mask` |
    | `policy_version` | [N, L] int64 | update count of the weights that sampled the token; -1 off `loss_mask` |
    | `prompt_lengths` | [N] int64 | tokens of the prompt |
    | `group_id` | [N] int64 | which prompt a rollout answers (not its position) |
    | `finish_reason`, `texts`, `prompts`, `rows` | N entries | why it ended; decoded completion; prompt; dataset row |
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    behaviour_logprobs: Tensor
    policy_version: Tensor
    prompt_lengths: Tensor
    group_id: Tensor
    finish_reason: tuple[FinishReason, ...]
    texts: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    rows: tuple[Mapping[str, Any], ...]
    settings: SamplingSettings

    _GRIDS: ClassVar = ("tokens", "attention_mask", "loss_mask", "behaviour_logprobs", "policy_version")
    _PER_ROLLOUT: ClassVar = ("finish_reason", "texts", "prompts", "rows")

    @staticmethod
    def from_groups(groups: Sequence[RolloutGroup], pad_id: int) -> RolloutBatch:
        """Pad the rollouts of `groups`, in order, into one batch."""
        if not groups:
            raise ShapeError(problem("RolloutBatch.from_groups", got="no groups", expected="at least one group"))
        pairs = [(g.request, r) for g in groups for r in g.rollouts]
        prompts = [torch.tensor(q.prompt_ids, dtype=torch.long) for q, _ in pairs]
        length = max(len(p) + len(r.completion_ids) for p, (_, r) in zip(prompts, pairs, strict=True))
        shape = (len(pairs), length)
        tokens = torch.full(shape, pad_id, dtype=torch.long)
        attention = torch.zeros(shape, dtype=torch.bool)
        loss_mask = torch.zeros(shape, dtype=torch.bool)
        behaviour = torch.zeros(shape, dtype=torch.float32)
        version = torch.full(shape, -1, dtype=torch.long)
        for i, (prompt, (_, rollout)) in enumerate(zip(prompts, pairs, strict=True)):
            start, end = len(prompt), len(prompt) + len(rollout.completion_ids)
            tokens[i, :start], tokens[i, start:end] = prompt, rollout.completion_ids
            attention[i, :end] = True
            loss_mask[i, start:end] = rollout.loss_mask
            sampled = rollout.loss_mask
            behaviour[i, start:end] = torch.where(sampled, rollout.behaviour_logprobs.float(), behaviour[i, start:end])
            version[i, start:end] = torch.where(sampled, rollout.policy_version, version[i, start:end])
        return RolloutBatch(
            tokens=tokens,
            attention_mask=attention,
            loss_mask=loss_mask,
            behaviour_logprobs=behaviour,
            policy_version=version,
            prompt_lengths=torch.tensor([len(p) for p in prompts]),
            group_id=torch.tensor([q.group_id for q, _ in pairs]),
            finish_reason=tuple(r.finish_reason for _, r in pairs),
            texts=tuple(r.text for _, r in pairs),
            prompts=tuple(q.prompt for q, _ in pairs),
            rows=tuple(q.row for q, _ in pairs),
            settings=groups[0].request.settings,
        )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """[N] int64: prompt + completion tokens of each rollout."""
        return self.attention_mask.sum(dim=1)

    @property
    def completion_lengths(self) -> Tensor:
        """[N] int64: completion tokens of each rollout."""
        return self.lengths - self.prompt_lengths

    @property
    def truncated(self) -> Tensor:
        """[N] bool: cut at the length limit."""
        return torch.tensor([reason == "length" for reason in self.finish_reason], device=self.tokens.device)

    def completion_ids(self, i: int) -> Tensor:
        """[T] int64: the completion of rollout `i`, unpadded."""
        return self.tokens[i, int(self.prompt_lengths[i]) : int(self.lengths[i])]

    def select(self, index: Tensor) -> RolloutBatch:
        """Return the rollouts at `index` [n] int64, padding cut to the longest of them."""
        length = int(self.lengths[index].max())
        rows = index.tolist()
        cut: dict[str, Any] = {name: getattr(self, name)[index, :length] for name in self._GRIDS}
        cut |= {name: getattr(self, name)[index] for name in ("prompt_lengths", "group_id")}
        cut |= {name: tuple(getattr(self, name)[i] for i in rows) for name in self._PER_ROLLOUT}
        return replace(self, **cut)

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return the batch with its tensors on `device`."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardOutput:
    """What the rewards say about N rollouts.

    `values` [N, R] float32, NaN where not scored; `weights` R floats; `status` R tuples of N `RewardStatus`;
    `correct` [N] int8 of `CORRECT`/`WRONG`/`UNKNOWN`; `answers` the N extracted answers in normal form (used by
    `maj@k`); `token_values` [N, L] float32, rewards of single tokens, or None.
    """

    names: tuple[str, ...]
    values: Tensor
    weights: tuple[float, ...]
    status: tuple[tuple[RewardStatus, ...], ...]
    correct: Tensor
    answers: tuple[str | None, ...]
    token_values: Tensor | None = None

    def __post_init__(self) -> None:
        n, r = len(self.answers), len(self.names)
        if tuple(self.values.shape) != (n, r) or tuple(self.correct.shape) != (n,):
            got = f"values {tuple(self.values.shape)}, correct {tuple(self.correct.shape)}"
            raise ShapeError(problem("RewardOutput", got=got, expected=f"values ({n}, {r}), correct ({n},)"))
        if len(self.weights) != r or len(self.status) != r or any(len(s) != n for s in self.status):
            raise ShapeError(problem("RewardOutput", got="weights or status of another length", expected=f"{r} x {n}"))

    @staticmethod
    def single(
        name: str,
        values: Sequence[float | None],
        *,
        weight: float = 1.0,
        status: Sequence[RewardStatus] | None = None,
        correct: Sequence[bool | None] | None = None,
        answers: Sequence[str | None] | None = None,
    ) -> RewardOutput:
        """Return the output of one reward; None is "not scored" as a value and "unknown" as correctness.

        Example:
            >>> RewardOutput.single("length", [0.5, None]).values.tolist()
            [[0.5], [nan]]
        """
        n = len(values)
        plain: Sequence[RewardStatus] = ["not_applicable" if v is None else "scored" for v in values]
        known = [UNKNOWN] * n if correct is None else [UNKNOWN if c is None else int(c) for c in correct]
        return RewardOutput(
            names=(name,),
            values=torch.tensor([[float("nan") if v is None else float(v)] for v in values]).reshape(n, 1),
            weights=(weight,),
            status=(tuple(plain if status is None else status),),
            correct=torch.tensor(known, dtype=torch.int8),
            answers=tuple(answers) if answers is not None else (None,) * n,
        )

    @staticmethod
    def merge(outputs: Sequence[RewardOutput]) -> RewardOutput:
        """Join several rewards of the same rollouts; the first that knows decides `correct` and `answers`."""
        first = outputs[0]
        correct, answers = first.correct, list(first.answers)
        token_values = [o.token_values for o in outputs if o.token_values is not None]
        for other in outputs[1:]:
            correct = torch.where(correct == UNKNOWN, other.correct, correct)
            answers = [a if a is not None else b for a, b in zip(answers, other.answers, strict=True)]
        return RewardOutput(
            names=tuple(name for o in outputs for name in o.names),
            values=torch.cat([o.values for o in outputs], dim=1),
            weights=tuple(w for o in outputs for w in o.weights),
            status=tuple(s for o in outputs for s in o.status),
            correct=correct,
            answers=tuple(answers),
            token_values=torch.stack(token_values).sum(0) if token_values else None,
        )

    @property
    def total(self) -> Tensor:
        """[N] float32: Σ_r weight_r · value_r over the applicable rewards; NaN when none is, or when one failed."""
        device = self.values.device
        weighted = self.values * torch.tensor(self.weights, device=device)
        nothing = self.values.isnan().all(dim=1)
        failed = [any(s[i] in NOT_A_SCORE for s in self.status) for i in range(len(self.answers))]
        return weighted.nansum(dim=1).masked_fill(nothing | torch.tensor(failed, device=device), float("nan"))

    def to(self, device: torch.device | str) -> RewardOutput:
        """Return the output with its tensors on `device`."""
        token_values = None if self.token_values is None else self.token_values.to(device)
        values, correct = self.values.to(device), self.correct.to(device)
        return replace(self, values=values, correct=correct, token_values=token_values)


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What a step needs to know about each token: the union over objective, divergence, masker and schedules.

    `sampled`: log-prob of the sampled token. `topk`: the K most likely tokens of the teacher. `student_topk`:
    log-probs at the K most likely tokens of the student. `full`: the whole distribution. `entropy`: nats.
    `temperature`: the distil temperature of all of them, which the step sets.
    """

    sampled: bool = False
    topk: int = 0
    student_topk: int = 0
    full: bool = False
    entropy: bool = False
    temperature: float = 1.0

    def __or__(self, other: ScoreRequest) -> ScoreRequest:
        return ScoreRequest(
            sampled=self.sampled or other.sampled,
            topk=max(self.topk, other.topk),
            student_topk=max(self.student_topk, other.student_topk),
            full=self.full or other.full,
            entropy=self.entropy or other.entropy,
            temperature=self.temperature,
        )

    def __bool__(self) -> bool:
        return self.sampled or self.topk > 0 or self.student_topk > 0 or self.full or self.entropy

    @property
    def needs_distribution(self) -> bool:
        """Whether the scores must be able to give any token's probability (hidden states and a head)."""
        return self.full or self.student_topk > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """One model's view of M token positions, at the distil temperature: what a divergence compares.

    `sampled` [M] log-prob of the sampled token; `topk` [M, K] log-probs at the ids of the top-k set, the same ids on
    both sides; `logits` [M, V] float32, both sides cut to the shared vocabulary. None where not requested.
    """

    sampled: Tensor | None = None
    topk: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherScores:
    """A frozen model's scores of N rollouts, without gradient.

    `valid` [N, L] bool: positions the teacher could score (within `loss_mask`). `sampled` [N, L] float32. `topk_ids`
    [N, L, K] int64 and `topk` [N, L, K] float32, at the distil temperature. `entropy` [N, L] float32 nats. For whole
    distributions no `[N, L, V]` is kept: `hidden` holds, per rollout, the states [T_i, H] that predict its `loss_mask`
    tokens in order, and `head` maps states [M, H] to logits [M, V] float32 (before temperature).
    """

    valid: Tensor
    sampled: Tensor | None = None
    topk_ids: Tensor | None = None
    topk: Tensor | None = None
    entropy: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    head: Callable[[Tensor], Tensor] | None = None

    def select(self, index: Tensor, length: int) -> TeacherScores:
        """Return the scores of the rollouts at `index` [n], cut to `length` positions."""
        cut = {
            name: None if (value := getattr(self, name)) is None else value[index, :length]
            for name in ("valid", "sampled", "topk_ids", "topk", "entropy")
        }
        hidden = None if self.hidden is None else tuple(self.hidden[i] for i in index.tolist())
        return replace(self, hidden=hidden, **cut)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentScores:
    """The student's scores of n rollouts; what the objective and the divergence made of them carries gradient.

    `logprobs` [n, L] at the sampling temperature; `distil_logprobs` [n, L] at the distil temperature; `divergence`
    [n, L] nats/token from the student to the teacher, `reference_divergence` to the reference, None without one;
    `entropy` [n, L] nats at the sampling temperature, None unless requested; `teacher_logprobs` [n, L] of the sampled
    token where the scoring pass came by them, without gradient. All are 0 where `loss_mask` [n, L] is False.
    """

    loss_mask: Tensor
    logprobs: Tensor
    distil_logprobs: Tensor
    divergence: Tensor | None = None
    reference_divergence: Tensor | None = None
    entropy: Tensor | None = None
    teacher_logprobs: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWeights:
    """Factors [N, L] float32 on the policy and the distillation term of each token; 1 keeps, 0 removes."""

    policy: Tensor
    distil: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutput:
    """What one rollout step did.

    `metrics`: name -> float, the metric names of the documentation. `rollouts`, `rewards`: this rank's. `per_token`:
    name -> [N, L] float32 for the rollout file. `updates`: optimizer steps taken; `skipped`: updates dropped for a
    non-finite loss.
    """

    rollouts: RolloutBatch
    rewards: RewardOutput | None
    metrics: Mapping[str, float]
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    skipped: int = 0
