"""What a run says on the screen: the step as one sentence, decoded rollouts, and where everything is."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from distillkit.components import DistillThrough
from distillkit.reporting.metrics import MetricSummary
from distillkit.types import CORRECT, WRONG, RewardOutput, RolloutBatch, SamplingSettings, StepOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "RowFacts",
    "RunFacts",
    "ScorerFacts",
    "TermFacts",
    "duration",
    "last_line",
    "printable",
    "reward_words",
    "say",
    "shorten",
    "show_rollouts",
    "show_start",
    "step_sentence",
]

_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True, kw_only=True)
class ScorerFacts:
    """A teacher or reference: its component's name, the model it loads (None: it has none), its parameter count."""

    name: str
    source: str | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class TermFacts:
    """A divergence of the step and its weight, as text: `TermFacts(name="k2", weight="0.2 (linear)")`."""

    name: str
    weight: str


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """Dataset rows of one source: how many are used, and how many were dropped for which reason."""

    source: str
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The resolved parts of a run; an empty slot is None, or empty.

    `rewards` are (name, weight). `objective_settings` is what to say of the objective in brackets. `divergence` is the
    term to the teacher, `reference_divergence` the one to the reference. `max_prompt_tokens` is of the prompts kept.
    """

    sampler: str
    settings: SamplingSettings
    prompts_per_step: int
    rewards: Sequence[tuple[str, float]] = ()
    teacher: ScorerFacts | None = None
    reference: ScorerFacts | None = None
    masker: str | None = None
    objective: str | None = None
    objective_settings: str | None = None
    divergence: TermFacts | None = None
    distill_through: DistillThrough = "loss"
    reference_divergence: TermFacts | None = None
    rows: Sequence[RowFacts] = ()
    max_prompt_tokens: int | None = None
    student: str
    student_parameters: int
    device: str
    precision: str
    max_steps: int | None = None
    run_folder: str

    @property
    def sampled_tokens_per_step(self) -> int:
        """Upper bound of the tokens that the student samples in a step, all ranks: P · G · T."""
        return self.prompts_per_step * self.settings.group_size * self.settings.max_new_tokens


def step_sentence(facts: RunFacts) -> str:
    r"""Return what a step does, in its own order, as one sentence.

    Example:
        >>> print(step_sentence(RunFacts(
        ...     sampler="hf", settings=SamplingSettings(group_size=8, max_new_tokens=48), prompts_per_step=16,
        ...     rewards=[("answer", 1.0)], objective="grpo", student="embedded:student", student_parameters=330_000,
        ...     device="cpu", precision="32-true", run_folder="runs/a",
        ... )).replace(" with hf, ", " with hf,\n"))
        Each step draws 16 prompts x 8 rollouts (up to 48 tokens, temperature 1) with hf,
        scores them with answer, and minimises grpo.
    """
    sampled = facts.settings
    how = [f"up to {_plural(sampled.max_new_tokens, 'token')}"]
    how.append(f"temperature {sampled.temperature:g}" if sampled.temperature > 0 else "greedy")
    how += [f"top-p {sampled.top_p:g}"] if sampled.top_p < 1 else []
    batch = f"{_plural(facts.prompts_per_step, 'prompt')} x {_plural(sampled.group_size, 'rollout')}"
    clauses = [f"draws {batch} ({', '.join(how)}) with {facts.sampler}"]
    if facts.rewards:
        names = [name if weight == 1 else f"{name} (weight {weight:g})" for name, weight in facts.rewards]
        clauses.append(f"scores them with {_join(names)}")
    scorers = [_scorer("teacher", facts.teacher), _scorer("reference", facts.reference)]
    if named := [text for text in scorers if text]:
        clauses.append(f"lets {_join(named)} score the same tokens")
    if facts.masker:
        clauses.append(f"lets {facts.masker} choose which tokens count")
    clauses.append(_update(facts))
    return f"Each step {_join(clauses)}."


def show_start(facts: RunFacts, console: Console) -> None:
    """Print, before step 1: the sentence, the rows kept and dropped, the size of a step, the models, the folder."""
    say(console, step_sentence(facts), style="bold")
    for rows in facts.rows:
        kept = f"Rows: {rows.source} {rows.kept:,} kept"
        reasons = [f"{count:,} {reason}" for reason, count in rows.dropped.items() if count]
        total = sum(rows.dropped.values())
        say(console, f"{kept}, {total:,} dropped ({', '.join(reasons)})" if reasons else f"{kept}, none dropped")
    prompts = "" if facts.max_prompt_tokens is None else f" after prompts of up to {facts.max_prompt_tokens:,}"
    steps = "" if facts.max_steps is None else f"; {_plural(facts.max_steps, 'step')} in all"
    say(console, f"At most {_plural(facts.sampled_tokens_per_step, 'sampled token')} per step{prompts}{steps}.")
    models = [("student", ScorerFacts(name="", source=facts.student, parameters=facts.student_parameters))]
    models += [(n, s) for n, s in (("teacher", facts.teacher), ("reference", facts.reference)) if s is not None]
    sizes = [
        f"{role} {model.source or model.name}" + ("" if model.parameters is None else f" ({_size(model.parameters)})")
        for role, model in models
    ]
    say(console, f"Models: {', '.join(sizes)}; on {facts.device}, precision {facts.precision}.")
    say(console, f"Everything is written to {facts.run_folder}.")


def show_rollouts(
    output: StepOutput, tokenizer: PreTrainedTokenizerBase, console: Console, count: int = 2, limit: int = 600
) -> None:
    """Print `count` decoded rollouts of one group with their rewards: its best and its worst first.

    The group is the first with a right and a wrong rollout, else the first. Texts are decoded with their special
    tokens, shortened in the middle to `limit` characters, control characters escaped.
    """
    rollouts, rewards = output.rollouts, output.rewards
    chosen = _choose(rollouts, rewards)[:count]
    if not chosen:
        return
    start = int(rollouts.prompt_lengths[chosen[0]])
    prompt = str(tokenizer.decode(rollouts.tokens[chosen[0], :start].tolist(), skip_special_tokens=False))
    say(console, f"{_plural(len(chosen), 'rollout')} of group {int(rollouts.group_id[chosen[0]])}, this step:")
    _block(console, "prompt", shorten(prompt, limit))
    for i in chosen:
        ids = rollouts.completion_ids(i).tolist()
        values = {} if rewards is None else dict(zip(rewards.names, rewards.values[i].tolist(), strict=True))
        total = None if rewards is None else float(rewards.total[i])
        correct = None if rewards is None else {CORRECT: True, WRONG: False}.get(int(rewards.correct[i]))
        words = [*reward_words(total, values, correct), rollouts.finish_reason[i], _plural(len(ids), "token")]
        say(console, f"  {', '.join(words)}", style="green" if correct else "red" if correct is False else "")
        _block(console, "text", shorten(str(tokenizer.decode(ids, skip_special_tokens=False)), limit))


def last_line(
    *,
    run_folder: str,
    seconds: float,
    steps: int,
    summary: MetricSummary | None = None,
    student_folder: str | None = None,
    stopped: str | None = None,
) -> str:
    """Return the last line of a run: what was reached, how long it took, where it is.

    Args:
        run_folder: where everything is.
        seconds: wall-clock time.
        steps: steps done.
        summary: the evaluation metric over the run.
        student_folder: the exported student, None when there is none.
        stopped: why the run ended early; None when it is done.

    Example:
        >>> last_line(run_folder="runs/a", seconds=151, steps=300, student_folder="runs/a/student")
        'Done: 300 steps in 2 min 31 s; student in runs/a/student, everything else in runs/a'
    """
    reached = _plural(steps, "step")
    if summary is not None and summary.last_step > summary.first_step:
        best = f"best {summary.best:.3f} at step {summary.best_step}"
        reached = f"{summary.name} {summary.first:.3f} -> {summary.last:.3f} ({best})"
    elif summary is not None:
        reached = f"{summary.name} {summary.last:.3f}"
    where = f"everything in {run_folder}"
    if student_folder is not None:
        where = f"student in {student_folder}, everything else in {run_folder}"
    start = "Done" if stopped is None else f"Stopped at step {steps} ({stopped})"
    return f"{start}: {reached} in {duration(seconds)}; {where}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them.

    Example:
        >>> duration(7.4), duration(151), duration(3900)
        ('7 s', '2 min 31 s', '1 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shorten(text: str, limit: int) -> str:
    """Return `text` with its middle left out when it is longer than `limit` characters.

    Example:
        >>> shorten("abcdefghij", 4)
        'ab [... 6 characters ...] ij'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[len(text) - half :]}"


def printable(text: str) -> str:
    r"""Return `text` with what could move the cursor or hide text escaped; line breaks stay.

    Example:
        >>> printable("a\x1b[31mb\rc")
        'a\\x1b[31mb\\rc'
    """

    def escape(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDI
        return character.encode("unicode_escape").decode() if hidden and character != "\n" else character

    return "".join(map(escape, text))


def reward_words(total: float | None, values: Mapping[str, float | None], correct: bool | None) -> list[str]:
    """Return `reward 1.5 (answer 1, format 0.5)` and `right`, `wrong` or nothing; NaN and None are "not scored".

    Example:
        >>> reward_words(1.0, {"answer": 1.0}, True)
        ['reward 1 (answer 1)', 'right']
    """
    each = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
    words = [f"reward {_short(total)}" + (f" ({each})" if each else "")] if values else []
    return words if correct is None else [*words, "right" if correct else "wrong"]


def say(console: Console, text: str | Text, *, style: str = "") -> None:
    """Print text as it is: no markup, no highlighting; lines are wrapped for terminals only."""
    shown = text if isinstance(text, Text) else Text(printable(text), style=style)
    console.print(shown, soft_wrap=not console.is_terminal, highlight=False)


def _update(facts: RunFacts) -> str:
    settings = f" ({facts.objective_settings})" if facts.objective_settings else ""
    terms = [f"{facts.objective}{settings}"] if facts.objective else []
    distil, reference = _term(facts.divergence, "teacher"), _term(facts.reference_divergence, "reference")
    losses = [term for term in (distil if facts.distill_through == "loss" else None, reference) if term is not None]
    as_loss = {0: "", 1: " as a loss"}.get(len(losses), " as losses")
    text = f"minimises {' + '.join(terms + losses)}{as_loss}" if terms or losses else ""
    if distil is None or facts.distill_through == "loss":
        return text or "updates nothing (no objective, no divergence)"
    place = "each token's advantage" if facts.distill_through == "advantage" else "each rollout's reward"
    return f"{text} with - {distil} added to {place}" if text else f"takes - {distil} as {place}"


def _term(term: TermFacts | None, other: str) -> str | None:
    return None if term is None else f"{term.weight} * {term.name}(student, {other})"


def _scorer(role: str, facts: ScorerFacts | None) -> str | None:
    return None if facts is None else f"the {facts.name} {role}" + (f" {facts.source}" if facts.source else "")


def _choose(rollouts: RolloutBatch, rewards: RewardOutput | None) -> list[int]:
    """Rollouts of one group: a best, a worst, then the others; with a right and a wrong one where there are."""
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(rollouts.group_id.tolist()):
        groups.setdefault(group, []).append(i)
    members = next(iter(groups.values()), [])
    if rewards is None or len(members) < 2:
        return members
    correct, total = rewards.correct.tolist(), rewards.total.nan_to_num(-math.inf).tolist()
    mixed = (m for m in groups.values() if {CORRECT, WRONG} <= {correct[i] for i in m})
    members = next(mixed, members)
    best = max(members, key=lambda i: (correct[i] == CORRECT, total[i]))
    others = [i for i in members if i != best]
    worst = min(others, key=lambda i: (correct[i] != WRONG, math.isinf(total[i]), total[i]))
    return [best, worst, *(i for i in others if i != worst)]


def _block(console: Console, label: str, text: str) -> None:
    """A labelled text; its further lines are indented under the first."""
    lines = re.sub(r"\n", "\n" + " " * 12, printable(text))
    say(console, Text().append(f"    {label:<8}", style="dim").append(lines))


def _join(parts: Sequence[str]) -> str:
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _size(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if parameters >= unit / 10:
            return f"{parameters / unit:.2f} {name} parameters"
    return f"{parameters:,} parameters"


def _short(value: float | None) -> str:
    return "not scored" if value is None or math.isnan(value) else f"{value:.3g}"
