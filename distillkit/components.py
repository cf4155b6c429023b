"""The seven slots, in data-flow order: what a part is given, what it returns, what it may not do.

`RolloutSampler` → `TeacherScorer`, `RewardFn` → `Masker`, `PolicyObjective`, `DivergenceEstimator`, `BetaScheduler`.

Rules for every part: keyword-only, typed, documented, JSON-able constructor arguments (`name` is reserved); no I/O in
`__init__`, heavy work in `setup`; inputs are never edited in place. A scalar argument that `model.schedules` may vary
is a plain attribute of the same name; the step asks `part.at({...})` for a copy with the scheduled values.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from distillkit.errors import ConfigError, problem
from distillkit.types import (
    RewardOutput,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    SamplingSettings,
    ScoreRequest,
    StudentScores,
    TeacherScores,
    TokenScores,
    TokenWeights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distillkit.scorer import StudentScorer

__all__ = [
    "Aggregation",
    "BetaScheduler",
    "Component",
    "DistillThrough",
    "DivergenceEstimator",
    "Masker",
    "PolicyObjective",
    "RewardFn",
    "RolloutSampler",
    "StudentBase",
    "StudentInfo",
    "TeacherScorer",
]

DistillThrough = Literal["loss", "advantage", "reward"]
ExactKL = Literal["forward_kl", "reverse_kl"]
"""How a divergence reaches the gradient: differentiated, as a detached per-token advantage, or inside the reward."""

Aggregation = Literal["token", "sequence", "constant"]
"""Token mean over the update; mean over each rollout's tokens, then over rollouts; sum divided by a constant length."""


@dataclass(frozen=True, kw_only=True)
class StudentBase:
    """The weights under the adapters of a student with LoRA, which training leaves as they are.

    `identity` is a digest of them. `whole()` is a context with the student, a peft model in it, gathered where it is
    sharded: every rank has to enter. It may be called once every part is set up.
    """

    identity: str
    whole: Callable[[], AbstractContextManager[StudentScorer]]


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """What a part may know of the student at start-up.

    `vocab_limit` is the number of token ids that both models share: columns at or beyond it take part in no softmax,
    and the sampler never emits such ids. `eos_token_ids` end a completion. `base` is None without LoRA.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_limit: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    device: torch.device
    base: StudentBase | None = None


class Component(ABC):
    """What all seven slots share."""

    kind: ClassVar[str]

    def setup(self, student: StudentInfo) -> None:  # noqa: B027 - most parts have nothing to set up
        """Load models, start pools, read files. Called once before the first step, on every rank."""

    def teardown(self) -> None:  # noqa: B027 - nor to free
        """Free what `setup` took. Called at the end of the run, after an exception too."""

    def at(self, values: Mapping[str, float]) -> Self:
        """Return this part with scalar attributes replaced, for one step; `self` is left as it is.

        Raises:
            ConfigError: a name is not a numeric attribute of the part.
        """
        if not values:
            return self
        part = copy.copy(self)
        for name, value in values.items():
            if not isinstance(getattr(part, name, None), int | float):
                hint = ", ".join(k for k, v in vars(self).items() if isinstance(v, int | float)) or None
                raise ConfigError(
                    problem(f"model.schedules: {type(self).__name__} has no number {name!r}", got=name, expected=hint)
                )
            setattr(part, name, value)
        return part


class RolloutSampler(Component):
    """Draws completions from the student's current weights.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: longest completion, in tokens.
        temperature: of the sampling softmax; 0 is greedy (evaluation only).
        top_p: nucleus; below 1 is refused in training, where its importance ratio is not defined.
    """

    kind = "sampler"
    same_engine: ClassVar[bool] = False
    """True when the sampler runs the trainer's own weights in place: behaviour and old policy are then the same."""
    max_engine_gap: float | None = None
    """Mean |log π_old − log μ| in nats/token above which the step stops; None: another policy's tokens are fine."""
    on_policy: ClassVar[bool] = True
    """False when some tokens are not draws of the student's: no policy gradient or estimate may be made of them."""

    def __init__(
        self, *, group_size: int = 8, max_new_tokens: int = 512, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        for name, value, ok, wanted in (
            ("group_size", group_size, group_size >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, temperature >= 0, "at least 0"),
            ("top_p", top_p, 0 < top_p <= 1, "0 < top_p <= 1"),
        ):
            if not ok:
                raise ConfigError(problem(f"model.sampler.{name}", got=value, expected=wanted))
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p

    @property
    def settings(self) -> SamplingSettings:
        """The sampling settings that requests of a training step carry."""
        return SamplingSettings(
            group_size=int(self.group_size),
            max_new_tokens=int(self.max_new_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
        )

    @property
    def evaluator(self) -> RolloutSampler:
        """The sampler that answers evaluation sets: this one, unless others' completions are mixed into its own."""
        return self

    @property
    def beside_training(self) -> bool:
        """Whether `sample` may run in a thread of its own while the student is trained (`model.one_step_off`)."""
        return not self.same_engine

    def break_off(self) -> None:
        """Make a `sample` that another thread runs end soon, by an error; there is no further one before `setup`."""

    @abstractmethod
    def sync(self, student: StudentScorer) -> None:
        """Take over the student's weights. Called before every step's `sample`."""

    @abstractmethod
    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield one group per request, each as soon as its last rollout is finished, in any order.

        A group's draws depend on its requests and their seeds alone. A completion ends with the end token (kept, with
        its log-prob) or at `max_new_tokens`. Ids at or beyond `StudentInfo.vocab_limit` are never emitted.
        """


class TeacherScorer(Component):
    """A frozen model's opinion of the student's own tokens, without gradient."""

    kind = "teacher"
    more_topk: ClassVar[str] = ""
    """What lets it offer the top `{k}`, where that is a setting."""

    @property
    @abstractmethod
    def offers(self) -> ScoreRequest:
        """The largest request this teacher can answer: checked when the run starts."""

    @abstractmethod
    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        """Score every `loss_mask` position of `rollouts`, by token ids, at `request.temperature`.

        Columns at or beyond `StudentInfo.vocab_limit` are dropped before any softmax.
        """

    @property
    def vocab_size(self) -> int | None:
        """V of the teacher's output head, None when it is not known before `setup`."""
        return None

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Return (row index, reason) for training rows it cannot score; one is enough to refuse the run at start-up."""
        return []

    @property
    def reads_rows(self) -> bool:
        """True where scores depend on a rollout's dataset row too, not on its token ids alone."""
        return False

    @property
    def any_temperature(self) -> bool:
        """False where it scores at temperature 1 only, whatever `model.distil_temperature` says."""
        return True

    @property
    def elsewhere(self) -> bool:
        """True where others compute: it is asked for each group as soon as that is finished, from several threads."""
        return False

    @abstractmethod
    def identity(self) -> str:
        """A stable digest of the weights and settings: stored in checkpoints, part of cache keys."""


class RewardFn(Component):
    """Values of finished rollouts.

    Args:
        weight: factor on this reward in the total.
    """

    kind = "reward"

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Return (row index, reason) for rows whose gold cannot be used; asked at start-up of the whole dataset."""
        return []

    @abstractmethod
    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return the reward of each rollout: NaN for not scored, `correct` where the reward can tell."""


class DivergenceEstimator(Component):
    """A per-token divergence between student and teacher; its name says the direction.

    `allowed_through` lists the `model.distill_through` values under which its gradient means something; `why_not` says
    why the others are refused.
    """

    kind = "divergence"
    allowed_through: ClassVar[tuple[DistillThrough, ...]] = ("loss", "advantage", "reward")
    why_not: ClassVar[str] = ""
    sums_to: ClassVar[ExactKL | None] = None
    """The KL over the whole vocabulary that it is, if it is one: it may then be summed without rows of logits.

    Not inherited by a subclass with a `__call__` of its own, which may be something else.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__call__" in vars(cls) and "sums_to" not in vars(cls):
            cls.sums_to = None

    @property
    @abstractmethod
    def needs(self) -> ScoreRequest:
        """The scores it compares, asked of student and teacher alike."""

    @abstractmethod
    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return nats/token [M]; gradient flows into the student's side only."""


class BetaScheduler(Component):
    """A number that changes with the step."""

    kind = "beta"
    steps_needed: int | None = None
    """Steps that a run must take to reach the last value; None where the values do not follow from the step alone.

    A run that ends earlier is told so, and the values at both ends are checked before any model is loaded.
    """

    @abstractmethod
    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return the value for rollout step `step` (from 0); `signals` are the metrics of the step before."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; empty for a pure function of the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""


class Masker(Component):
    """Which tokens the policy and the distillation term may learn from.

    `allowed_through` lists the `model.distill_through` values under which its two factors mean what they say; `why_not`
    says why the others are refused.
    """

    kind = "masker"
    needs: ClassVar[ScoreRequest] = ScoreRequest()
    allowed_through: ClassVar[tuple[DistillThrough, ...]] = ("loss", "advantage", "reward")
    why_not: ClassVar[str] = ""

    @abstractmethod
    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        """Return factors [N, L]; decided by `rewards.correct` (unknown is not wrong), never by `reward == 0`."""


class PolicyObjective(Component):
    """From rewards to advantages, and from advantages to a loss that is minimised."""

    kind = "objective"
    needs: ClassVar[ScoreRequest] = ScoreRequest()
    """Teacher scores the loss reads; `ScoreRequest(sampled=True)` for a ratio with a teacher in it."""
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    """The divisor of `constant` aggregation, in tokens; None is the sampler's `max_new_tokens`."""

    @abstractmethod
    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        """Return [N, L] float32, detached; 0 for a rollout without reward. Groups are whole, by `group_id`."""

    @abstractmethod
    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        """Return the per-token loss [n, L] of whole rollouts, before aggregation; 0 gradient where the advantage is 0.

        `old_logprobs` [n, L] are the trainer's own at sampling time, at the sampling temperature, detached.
        """

    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        """Return named per-token values [n, L] whose token mean is logged as `train/<name>`."""
        return {}
