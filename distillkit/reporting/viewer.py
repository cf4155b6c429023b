"""`distillkit rollouts RUN`: rollouts in the terminal, each token coloured by what the teacher thinks of it."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from distillkit.errors import ConfigError, problem
from distillkit.reporting.rollouts import RecordedRollout, read_rollouts, rollout_files
from distillkit.reporting.screen import printable, reward_words, say, shorten

__all__ = ["main"]

_LEVELS = (
    (-math.inf, -2.0, "bold white on red", "d < -2"),
    (-2.0, -0.5, "red", "-2 to -0.5"),
    (-0.5, 0.5, "", "-0.5 to 0.5"),
    (0.5, 2.0, "green", "0.5 to 2"),
    (2.0, math.inf, "bold white on green", "d >= 2"),
)
_LISTED = 3
"""Disliked tokens named for a rollout."""

_LONGEST = 1200
"""Characters of a prompt or gold answer that are shown; completions are shown whole."""


def main(argv: Sequence[str]) -> int:
    """Run `distillkit rollouts` with the arguments after it; return the exit code.

    Raises:
        ConfigError: no such run, no rollouts in it, or not of that step.
        DataError: a rollout file that cannot be read.
    """
    options = _parser().parse_args(argv)
    steps = _files(Path(options.run))
    step = max(steps) if options.step is None else options.step
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise ConfigError(problem(f"{options.run}: no rollouts of this step", got=step, expected=f"one of {known}"))
    rollouts = [rollout for path in steps[step] for rollout in read_rollouts(path)]
    if options.sort is not None:
        rollouts.sort(key=_SORTS[options.sort])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # shows the rest where a character cannot be shown
    colour = not options.no_color and "NO_COLOR" not in os.environ
    console = Console(color_system="auto" if colour else None)
    shown = rollouts if options.limit is None else rollouts[: options.limit]
    say(console, f"{options.run}, step {step}: {len(shown)} of {len(rollouts)} rollouts")
    if any(rollout.mean_log_ratio is not None for rollout in shown):
        say(console, _legend(coloured=console.color_system is not None))
    for number, rollout in enumerate(shown, start=1):
        _show(console, number, rollout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit rollouts",
        description="Show what was sampled at a step, each token coloured by d = log pi_teacher - log pi_student.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its rollouts/*.jsonl")
    parser.add_argument("--step", type=int, help="the step to show (default: the newest that was written)")
    parser.add_argument(
        "--sort",
        choices=sorted(_SORTS),
        help="reward: highest first; gap: those whose tokens the teacher dislikes most first (default: by group)",
    )
    parser.add_argument("--limit", type=_positive, help="show at most so many rollouts (default: all)")
    parser.add_argument("--no-color", action="store_true", help="plain text, as when the output is no terminal")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return int(text)


def _none_last(value: float | None, *, highest_first: bool) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else -value if highest_first else value


_SORTS: dict[str, Callable[[RecordedRollout], tuple[bool, float]]] = {
    "reward": lambda rollout: _none_last(rollout.total, highest_first=True),
    "gap": lambda rollout: _none_last(rollout.mean_log_ratio, highest_first=False),
}


def _files(run: Path) -> dict[int, tuple[Path, ...]]:
    if run.is_file():
        records = read_rollouts(run)
        return {records[0].step: (run,)} if records else _no_rollouts(run)
    if not run.is_dir():
        raise ConfigError(problem(f"{run}: no such run", expected="a run folder, or one of its rollouts/*.jsonl"))
    return rollout_files(run / "rollouts") or rollout_files(run) or _no_rollouts(run)


def _no_rollouts(run: Path) -> dict[int, tuple[Path, ...]]:
    hint = "the first are written after step 1"
    raise ConfigError(problem(f"{run}: no rollouts in it", expected="rollouts/step-<step>.jsonl", hint=hint))


def _show(console: Console, number: int, rollout: RecordedRollout) -> None:
    gap = rollout.mean_log_ratio
    words = [
        f"group {rollout.group_id}",
        *reward_words(rollout.total, rollout.rewards, rollout.correct),
        *(f"{name} {status}" for name, status in rollout.status.items() if status != "scored"),
        rollout.finish_reason,
        f"{len(rollout.token_ids)} tokens",
        *([] if gap is None else [f"mean gap {gap:+.3f} nats/token"]),
    ]
    style = {True: "bold green", False: "bold red", None: "bold"}[rollout.correct]
    say(console, "")
    say(console, f"[{number}] {', '.join(words)}", style=style)
    _field(console, "prompt", Text(printable(shorten(_prompt(rollout), _LONGEST))))
    if rollout.gold is not None:
        gold = rollout.gold if isinstance(rollout.gold, str) else json.dumps(rollout.gold, ensure_ascii=False)
        _field(console, "gold", Text(printable(shorten(gold, _LONGEST))))
    _field(console, "tokens", _tokens(rollout))
    if disliked := _disliked(rollout):
        _field(console, "disliked", Text(disliked))


def _prompt(rollout: RecordedRollout) -> str:
    if isinstance(rollout.prompt, str):
        return rollout.prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in rollout.prompt)


def _tokens(rollout: RecordedRollout) -> Text:
    text = Text()
    for token, d, sampled in zip(rollout.token_texts, rollout.log_ratios, rollout.sampled, strict=True):
        style = "dim" if d is None or not sampled else next(s for low, high, s, _ in _LEVELS if low <= d < high)
        text.append(printable(token).replace("\n", "\\n\n"), style=style)
    return text


def _disliked(rollout: RecordedRollout) -> str:
    """The tokens that the teacher finds most unlike its own, with their place: what a plain terminal can show too."""
    known = [(d, place) for place, d in enumerate(rollout.log_ratios) if d is not None and d < -0.5]
    worst = sorted(known)[:_LISTED]
    return ", ".join(f"{json.dumps(rollout.token_texts[place])} at {place} ({d:+.2f})" for d, place in worst)


def _legend(*, coloured: bool) -> Text:
    text = Text("d = log pi_teacher - log pi_student of a token, nats; disliked: the lowest d below -0.5")
    if coloured:
        text.append("\ncolours: ")
        for _, _, style, label in _LEVELS:
            text.append(f" {label} ", style=style).append(" ")
        text.append("not computed", style="dim")
    return text


def _field(console: Console, label: str, value: Text) -> None:
    """A labelled text; its further lines are indented under the first."""
    lines = value.split("\n", allow_blank=True)
    for number, line in enumerate(lines):
        say(console, Text().append(f"    {label if number == 0 else '':<10}", style="dim").append_text(line))
