"""How far a student's trace follows the structure of the teacher's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from distillkit.components import RewardFn, StudentInfo
from distillkit.errors import ConfigError, ScoringError
from distillkit.errors import problem as refusal
from distillkit.functional.structure import coverage, structural_reward
from distillkit.rewards.extract import gold_cell
from distillkit.rewards.gsrm.alignment import Agreement, Case, align
from distillkit.rewards.gsrm.cache import Decompositions, Recent
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided
from distillkit.rewards.gsrm.judge import ExactJudge, StepJudge, StepPair
from distillkit.rewards.gsrm.training_rows import problem_text, thoughts
from distillkit.types import RewardOutput, RewardStatus, RolloutBatch

__all__ = ["StructureReward"]

_LOG = logging.getLogger(__name__)
_VERDICTS = 131_072
"""How many of the judge's verdicts are kept in memory."""


class StructureReward(RewardFn):
    """The structural reward of RLKD: steps in which the student's trace goes where the teacher's went.

    A decomposer takes both traces apart into steps (meta-reasoning, sub-problem, answer); a judge compares them in
    order, up to the first step whose meta-reasoning turns to another sub-problem. A step counts 1, halved for a
    differing sub-problem and for a differing answer (`distillkit.functional.structure`).

        value = Σ_i s_i  [/ N_t]  +  coverage_weight · min(1, N_s / N_t)

    A student's trace that is empty has no steps: 0, `unparseable`. A trace, the teacher's or the student's, that the
    decomposer cannot take apart (no decomposition in its reply, longer than its context, a server that fails) and a
    step on which the judge says neither yes nor no give NaN, `undecided`: the rollout has no reward and is left out of
    its group, and is counted. Correctness is unknown.

    Student traces are taken apart when they are sampled, each text once. Teacher traces are kept by content: in memory,
    and on disk with `cache_dir`. All rollouts of a batch are judged in lockstep, two calls of the judge per step.

    See *Distilling the Implicit Multi-Branch Structure in LLMs' Reasoning via Reinforcement Learning* (RLKD), Xu et
    al., 2025, https://arxiv.org/abs/2505.16142. The mix with the outcome reward is that of `weight`.

    Args:
        decomposer: takes traces apart: `local`, `server`, or a class of your own.
        judge: decides whether two parts of steps agree: `exact` (the default), `overlap`, `local_lm`, `server_lm`, or a
            class of your own.
        trace: column with the teacher's trace.
        problem: column with the problem as the decomposer sees it; null is the prompt (of messages, what the user
            wrote).
        normalize: `none` is the released code's sum, in steps; `teacher_steps` divides it by N_t.
        coverage_weight: factor on the coverage term, which the released code computes and does not use.
        think_end: only what stands before it is reasoning, in the student's and the teacher's text; null takes all.
        without_trace: what the rollouts of a row without a teacher trace are. `undecided`: not scored, and counted;
            the row is named when the run starts, and a set without any trace is refused. `skip`: `not_applicable`, as
            evaluation sets without traces need.
        cache_dir: folder for the decompositions of teacher traces, which several processes may share.
        weight: factor on this reward in the total.

    Raises:
        ConfigError: an argument out of range.
        DataError: the data has no column `trace` or `problem`.
    """

    def __init__(
        self,
        *,
        decomposer: Decomposer,
        judge: StepJudge | None = None,
        trace: str = "teacher_trace",
        problem: str | None = None,
        normalize: Literal["none", "teacher_steps"] = "none",
        coverage_weight: float = 0.0,
        think_end: str | None = "</think>",
        without_trace: Literal["undecided", "skip"] = "undecided",
        cache_dir: str | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        for name, value, known in (
            ("normalize", normalize, ("none", "teacher_steps")),
            ("without_trace", without_trace, ("undecided", "skip")),
        ):
            if value not in known:
                raise ConfigError(_refusal(name, repr(value), " or ".join(known)))
        if coverage_weight < 0:
            raise ConfigError(_refusal("coverage_weight", coverage_weight, "at least 0"))
        if think_end == "":
            raise ConfigError(_refusal("think_end", "''", "text, such as </think>, or null"))
        self.decomposer = decomposer
        self.judge = ExactJudge() if judge is None else judge
        self.trace, self.problem = trace, problem
        self.normalize = normalize
        self.coverage_weight = coverage_weight
        self.think_end = think_end
        self.without_trace = without_trace
        self.cache_dir = cache_dir
        self._decompositions: Decompositions | None = None
        self._verdicts: Recent[StepPair, tuple[bool]] = Recent(_VERDICTS)
        self._told: set[str] = set()

    def setup(self, student: StudentInfo) -> None:
        """Load the models or open the connections, and the cache's folder; send each server one tiny request.

        Raises:
            ConfigError: a server that nobody runs, or that refuses the key, the model or the path.
        """
        self.decomposer.setup(student.device)
        self.judge.setup(student.device)
        self.decomposer.probe()
        self.judge.probe()
        folder = None if self.cache_dir is None else Path(self.cache_dir).expanduser()
        self._decompositions = Decompositions(self.decomposer, folder)

    def teardown(self) -> None:
        """Free the models or close the connections."""
        self.decomposer.teardown()
        self.judge.teardown()

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Return the rows whose teacher trace is missing or empty (unless those are skipped), or is no text."""
        return [(i, reason) for i, row in enumerate(rows) if (reason := self._why_unusable(row)) is not None]

    def _why_unusable(self, row: Mapping[str, Any]) -> str | None:
        cell = row.get(self.trace)
        if cell is not None and not isinstance(cell, str):
            return f"the teacher trace in {self.trace!r} is a {type(cell).__name__}, not text"
        if self.without_trace == "skip" or (cell and thoughts(cell, self.think_end)):
            return None
        if self.trace in row:
            return f"the teacher trace in {self.trace!r} is empty"
        return f"no column {self.trace!r} (gsrm.trace names it; gsrm.without_trace: skip goes without)"

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return the structural reward of each rollout, NaN where it could not be told."""
        if self._decompositions is None:
            raise ScoringError(refusal("StructureReward", got="called before setup", hint="call setup first"))
        values: list[float | None] = [None] * len(rollouts)
        status: list[RewardStatus] = ["undecided"] * len(rollouts)
        pairs: dict[int, tuple[Item, Item]] = {}
        for i, (row, prompt, text) in enumerate(zip(rollouts.rows, rollouts.prompts, rollouts.texts, strict=True)):
            about = problem_text(prompt) if self.problem is None else str(gold_cell(row, self.problem, "gsrm"))
            teacher_trace, trace = self._teacher_trace(row), thoughts(text, self.think_end)
            if teacher_trace and trace:
                pairs[i] = (about, trace), (about, teacher_trace)
            elif teacher_trace:
                values[i], status[i] = 0.0, "unparseable"
            elif self.without_trace == "skip":
                status[i] = "not_applicable"
            else:
                self._tell("a teacher's trace", "it is empty")
        steps = self._decompositions.of([ours for ours, _ in pairs.values()], [theirs for _, theirs in pairs.values()])
        cases: dict[int, Case] = {}
        for i, (ours, theirs) in pairs.items():
            student, teacher = steps[ours], steps[theirs]
            if isinstance(teacher, Undecided):
                self._tell("a teacher's trace", teacher.reason, teacher.detail)
            elif isinstance(student, Undecided):
                self._tell("a student's trace", student.reason, student.detail)
            else:
                cases[i] = Case(student=student, teacher=teacher, problem=ours[0])
        for (i, case), agreement in zip(cases.items(), align(list(cases.values()), self._agree), strict=True):
            if agreement is None:
                self._tell("the judge", "neither yes nor no")
            else:
                values[i], status[i] = self.value(agreement, case), "scored"
        return RewardOutput.single("gsrm", values, weight=self.weight, status=status)

    def value(self, agreement: Agreement, case: Case) -> float:
        """Return the reward of one rollout whose steps were judged."""
        value = structural_reward(agreement.meta, agreement.question, agreement.answer)
        ours, theirs = len(case.student.steps), len(case.teacher.steps)
        if self.normalize == "teacher_steps":
            value /= theirs
        return value + self.coverage_weight * coverage(ours, theirs)

    def _teacher_trace(self, row: Mapping[str, Any]) -> str:
        """The teacher's reasoning in a row; empty where there is none."""
        if self.without_trace == "skip" and row.get(self.trace) is None:
            return ""
        cell = gold_cell(row, self.trace, "gsrm")
        return thoughts(cell, self.think_end) if isinstance(cell, str) else ""

    def _agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        """What the judge says, each pair asked once."""
        asked = [pair for pair in dict.fromkeys(pairs) if self._verdicts.get(pair) is None]
        said = dict(zip(asked, self.judge.agree(asked) if asked else (), strict=True))
        found = [said[pair] if pair in said else self._known(pair) for pair in pairs]
        for pair, verdict in said.items():
            if verdict is not None:
                self._verdicts[pair] = (verdict,)
        return found

    def _known(self, pair: StepPair) -> bool | None:
        known = self._verdicts.get(pair)
        return None if known is None else known[0]

    def _tell(self, whose: str, reason: str, detail: str = "") -> None:
        """Say the first failure of each kind; all of them are counted as `train/undecided/gsrm`."""
        kind = f"{whose}: {reason}"
        if kind not in self._told:
            self._told.add(kind)
            text = "gsrm: %s; the rollout is not scored, and counted. Said once for each kind"
            _LOG.warning(text, f"{kind} ({detail})" if detail else kind)


def _refusal(name: str, got: object, expected: str) -> str:
    return refusal(f"model.rewards: gsrm.{name}", got=got, expected=expected)
