"""Combinations that cannot work, refused when the run starts with the reason and the setting that would work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from distillkit.components import (
    BetaScheduler,
    Component,
    DistillThrough,
    DivergenceEstimator,
    Masker,
    PolicyObjective,
    RewardFn,
    RolloutSampler,
    TeacherScorer,
)
from distillkit.errors import ConfigError, did_you_mean, problem
from distillkit.schedules import end_point_problems
from distillkit.types import SamplingSettings, ScoreRequest

__all__ = ["SCHEDULED_SCALARS", "StepParts", "check_parts", "check_supervised", "teacher_request"]

SCHEDULED_SCALARS = ("policy_weight", "distil_temperature")
"""Scalars of the step itself that `model.schedules` may vary, beside those of the parts."""

_SCHEDULED_PARTS = ("sampler", "divergence", "masker", "objective")


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """The parts of a step, one field per YAML key; an empty slot is None."""

    sampler: RolloutSampler
    teacher: TeacherScorer | None = None
    reference: TeacherScorer | None = None
    rewards: tuple[RewardFn, ...] = ()
    divergence: DivergenceEstimator | None = None
    reference_divergence: DivergenceEstimator | None = None
    beta: BetaScheduler | None = None
    reference_beta: BetaScheduler | None = None
    masker: Masker | None = None
    objective: PolicyObjective | None = None
    schedules: Mapping[str, BetaScheduler] = field(default_factory=dict)

    def components(self) -> Iterator[Component]:
        """Yield every part that is there."""
        slots = (self.sampler, self.teacher, self.reference, *self.rewards, self.divergence, self.reference_divergence)
        more = (self.beta, self.reference_beta, self.masker, self.objective, *self.schedules.values())
        yield from (part for part in (*slots, *more) if part is not None)


def teacher_request(parts: StepParts) -> ScoreRequest:
    """Return the union of what objective, divergence and masker ask of the teacher."""
    request = ScoreRequest()
    for part in (parts.divergence, parts.objective, parts.masker):
        if part is not None:
            request = request | part.needs
    return request


def check_parts(
    parts: StepParts, distill_through: DistillThrough, distil_temperature: float = 1.0, *, one_step_off: bool = False
) -> None:
    """Refuse parts that cannot work together; every problem is reported at once.

    Raises:
        ConfigError: with one paragraph per problem.
    """
    problems = [
        *_sampling(parts),
        *(_overlap(parts) if one_step_off else ()),
        *_given_tokens(parts),
        *_learning(parts, distill_through),
        *_teacher(parts),
        *_divergence(parts, distill_through),
        *_reference(parts),
        *_temperature(parts.teacher, distil_temperature, "distil_temperature" in parts.schedules),
        *_temperature(parts.reference, distil_temperature, "distil_temperature" in parts.schedules),
        *_schedules(parts),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_supervised(
    *,
    teacher: TeacherScorer | None,
    divergence: DivergenceEstimator | None,
    beta: BetaScheduler | None,
    sft_weight: float,
    distil_temperature: float = 1.0,
) -> None:
    """Refuse parts that cannot work together on given completions; every problem is reported at once.

    Raises:
        ConfigError: with one paragraph per problem.
    """
    problems = [
        *_cross_entropy(divergence, sft_weight),
        *_offline(teacher, divergence, beta),
        *_temperature(teacher, distil_temperature, scheduled=False),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _cross_entropy(divergence: DivergenceEstimator | None, sft_weight: float) -> Iterator[str]:
    if not 0 <= sft_weight < math.inf:
        yield problem("model.sft_weight", got=sft_weight, expected="a finite number, at least 0")
    elif sft_weight == 0 and divergence is None:
        hint = "model.sft_weight: 1.0, or model.divergence: forward_kl with a model.teacher"
        yield problem("model: nothing to learn from", got="sft_weight 0 and divergence null", hint=hint)


def _offline(
    teacher: TeacherScorer | None, divergence: DivergenceEstimator | None, beta: BetaScheduler | None
) -> Iterator[str]:
    local = "model.teacher: {name: local, path: ...}"
    if divergence is None:
        if teacher is not None:
            where = "model.teacher: nothing is asked of the teacher"
            hint = "model.divergence: forward_kl, or model.teacher: null"
            yield problem(where, got="divergence null", hint=hint)
        return
    name, needs = type(divergence).__name__, divergence.needs
    if needs.sampled:
        where = f"model.divergence: {name} is an estimate over the student's own samples, and here the tokens are given"
        expected = "a divergence of whole distributions or of top-k tokens"
        yield problem(where, got=_describe(needs), expected=expected, hint="model.divergence: forward_kl")
    elif "loss" not in divergence.allowed_through:
        yield problem(f"model.divergence: {name} cannot be used as a loss: {divergence.why_not}")
    if beta is None:
        where = "model.beta: the divergence has no coefficient"
        yield problem(where, got="null", expected="a number", hint="model.beta: 1.0")
    if teacher is None:
        where = f"model.teacher: divergence {name} needs a teacher"
        hint = f"{local}, or model.divergence: null"
        yield problem(where, got="null", expected=f"a teacher that gives {_describe(needs)}", hint=hint)
    elif lacking := _lacking(teacher.offers, needs):
        where = f"model.divergence: {name} needs what the teacher {type(teacher).__name__} does not give"
        yield problem(where, got=_describe(teacher.offers), expected=lacking, hint=_more(teacher, needs))


def _sampling(parts: StepParts) -> Iterator[str]:
    sampler = parts.sampler
    if sampler.temperature == 0:
        hint = "model.sampler.temperature: 1.0"
        yield problem("model.sampler.temperature: training needs draws, not the mode", got=0, expected="> 0", hint=hint)
    if sampler.top_p < 1:
        hint = "model.sampler.top_p: 1.0 (evaluation sets have their own top_p)"
        where = "model.sampler.top_p: the importance ratio of truncated sampling is not defined in training"
        yield problem(where, got=sampler.top_p, expected="1.0", hint=hint)
    if sampler.group_size == 1 and sampler.on_policy and parts.objective is not None and parts.rewards:
        where = "model.sampler.group_size: the group is the baseline; with one rollout every advantage is 0"
        hint = "model.sampler.group_size: 8, or model.rewards: [] to distil alone"
        yield problem(where, got=1, expected="at least 2 with rewards and an objective", hint=hint)


def _overlap(parts: StepParts) -> Iterator[str]:
    if not parts.sampler.beside_training:
        where = "model.one_step_off: this sampler cannot sample while the student is trained"
        got, hint = type(parts.sampler).__name__, "model.sampler: vllm_server, or model.one_step_off: false"
        yield problem(where, got=got, expected="a sampler with weights of its own, awake", hint=hint)


def _given_tokens(parts: StepParts) -> Iterator[str]:
    if parts.sampler.on_policy:
        return
    name = type(parts.sampler).__name__
    if parts.objective is not None:
        where = f"model.objective: the sampler {name} also gives tokens of others, which have no policy gradient"
        hint = "model.objective: null, or model.sampler: hf"
        yield problem(where, got=type(parts.objective).__name__, expected="null", hint=hint)
    for key in ("divergence", "reference_divergence"):
        part = getattr(parts, key)
        if part is not None and part.needs.sampled:
            estimate = f"{type(part).__name__} is an estimate over the student's own samples"
            where = f"model.{key}: {estimate}, and the sampler {name} also gives tokens of others"
            expected = "a divergence of whole distributions or of top-k tokens"
            yield problem(where, got=_describe(part.needs), expected=expected, hint=f"model.{key}: jsd")


def _learning(parts: StepParts, distill_through: DistillThrough) -> Iterator[str]:
    if parts.objective is None and parts.divergence is None:
        hint = "model.objective: grpo, or model.divergence: k2 with a model.teacher"
        yield problem("model: nothing to learn from", got="objective null and divergence null", hint=hint)
    if parts.objective is not None and not parts.rewards and (parts.divergence is None or distill_through == "loss"):
        where = f"model.rewards: the objective {type(parts.objective).__name__} has no rewards to learn from"
        yield problem(where, got="[]", hint="model.rewards: [math_verify], or model.objective: null to distil alone")


def _teacher(parts: StepParts) -> Iterator[str]:
    if parts.teacher is None:
        for key in ("divergence", "objective", "masker"):
            part = getattr(parts, key)
            if part is not None and part.needs:
                where = f"model.teacher: {key} {type(part).__name__} needs a teacher"
                hint = f"model.teacher: {{name: local, path: ...}}, or model.{key}: null"
                if key == "objective":
                    hint = "model.teacher: {name: local, path: ...}, or model.objective: grpo"
                yield problem(where, got="null", expected=f"a teacher that gives {_describe(part.needs)}", hint=hint)
        return
    for key in ("divergence", "objective", "masker"):
        part = getattr(parts, key)
        if part is not None and (lacking := _lacking(parts.teacher.offers, part.needs)):
            name, teacher = type(part).__name__, type(parts.teacher).__name__
            where = f"model.{key}: {name} needs what the teacher {teacher} does not give"
            hint = _more(parts.teacher, part.needs)
            yield problem(where, got=_describe(parts.teacher.offers), expected=lacking, hint=hint)


def _temperature(part: TeacherScorer | None, value: float, scheduled: bool) -> Iterator[str]:
    if part is None or part.any_temperature or (value == 1 and not scheduled):
        return
    key = "model.schedules.distil_temperature" if scheduled else "model.distil_temperature"
    got, hint = ("a schedule", "none") if scheduled else (value, "1.0")
    where = f"{key}: {type(part).__name__} scores at temperature 1 only"
    yield problem(where, got=got, expected=1.0, hint=f"{key}: {hint}, or model.teacher: {{name: local, path: ...}}")


def _divergence(parts: StepParts, distill_through: DistillThrough) -> Iterator[str]:
    if parts.divergence is None:
        return
    through, masker = _article(distill_through), parts.masker
    possible = [t for t in parts.divergence.allowed_through if masker is None or t in masker.allowed_through]
    for part, use in ((parts.divergence, "be used as"), (masker, "mask a divergence used as")):
        if part is not None and distill_through not in part.allowed_through:
            where = f"model.distill_through: {type(part).__name__} cannot {use} {through}: {part.why_not}"
            allowed = " or ".join(part.allowed_through)
            hint = f"model.distill_through: {possible[0]}" if possible else "another divergence or masker"
            yield problem(where, got=distill_through, expected=allowed, hint=hint)
    if parts.beta is None:
        yield problem(
            "model.beta: the divergence has no coefficient", got="null", expected="a number", hint="model.beta: 0.02"
        )
    if distill_through != "loss" and parts.objective is None:
        where = f"model.objective: distilling through the {distill_through} needs a policy gradient"
        yield problem(where, got="null", hint="model.objective: grpo")


def _reference(parts: StepParts) -> Iterator[str]:
    reference, divergence = parts.reference, parts.reference_divergence
    if reference is None:
        return
    if divergence is None or parts.reference_beta is None:
        where = "model.reference: a reference needs a divergence and a coefficient"
        got = f"reference_divergence {divergence}, reference_beta {parts.reference_beta}"
        yield problem(where, got=got, hint="model.reference_divergence: k2 and model.reference_beta: 0.001")
    elif "loss" not in divergence.allowed_through:
        where = (
            f"model.reference_divergence: {type(divergence).__name__} cannot be used as a loss: {divergence.why_not}"
        )
        yield problem(where, hint="model.reference_divergence: k2")
    elif lacking := _lacking(reference.offers, divergence.needs):
        yield problem("model.reference_divergence", got=_describe(reference.offers), expected=lacking)


def _schedules(parts: StepParts) -> Iterator[str]:
    known = list(SCHEDULED_SCALARS)
    scheduled = {key: part for key in _SCHEDULED_PARTS if (part := getattr(parts, key)) is not None}
    for key, part in scheduled.items():
        numbers = [n for n, v in vars(part).items() if isinstance(v, int | float) and not isinstance(v, bool)]
        if key == "sampler":  # a step hands its sampler the sampling settings, and nothing else of the copy
            numbers = [n for n in numbers if n in SamplingSettings.__dataclass_fields__]
        known += [f"{key}.{name}" for name in numbers]
    for path in parts.schedules:
        if path not in known:
            yield problem(
                f"model.schedules.{path}: no such number",
                got=path,
                expected=", ".join(known),
                hint=did_you_mean(path, known),
            )
    yield from end_point_problems(scheduled, parts.schedules)


def _lacking(offers: ScoreRequest, needs: ScoreRequest) -> str | None:
    lacking = [
        text
        for text, missing in (
            ("sampled log-probs", needs.sampled and not offers.sampled),
            (f"its top {needs.topk} log-probs (it gives {offers.topk})", needs.topk > offers.topk),
            ("log-probs at the student's top tokens", needs.student_topk > offers.student_topk),
            ("whole distributions", needs.full and not offers.full),
            ("entropies", needs.entropy and not offers.entropy),
        )
        if missing
    ]
    return ", ".join(lacking) or None


def _more(teacher: TeacherScorer, needs: ScoreRequest) -> str:
    if teacher.more_topk and needs == replace(needs, student_topk=0, full=False, entropy=False):
        return teacher.more_topk.format(k=needs.topk)
    return "model.teacher: {name: local, path: ...} gives everything"


def _describe(request: ScoreRequest) -> str:
    parts = [
        text
        for text, there in (
            ("sampled log-probs", request.sampled),
            (f"top-{request.topk} log-probs", request.topk > 0),
            ("log-probs at the student's top tokens", request.student_topk > 0),
            ("whole distributions", request.full),
            ("entropies", request.entropy),
        )
        if there
    ]
    return ", ".join(parts) or "nothing"


def _article(distill_through: str) -> str:
    return f"an {distill_through}" if distill_through[0] in "aeiou" else f"a {distill_through}"
