"""The tables of docs/performance.md, each a function of lines of a record."""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cases import CASES
from limit import METHODS, floor

__all__ = ["Side", "distances", "floors", "kdrl", "markdown", "modes", "side", "speed"]

Line = dict[str, Any]
PEERS = ("grpo", "distil")
PLAIN = ("default", "best")
"""TRL's modes that are not tuned to a case."""
PHASES = ("rollout", "teacher", "update", "step")


@dataclass(frozen=True)
class Side:
    """One mode of one side: its measured steps, seconds, the median of its runs' peaks, bytes, and tokens a step."""

    mode: str
    seconds: tuple[float, ...]
    peak: float
    tokens: float

    @property
    def median(self) -> float:
        """Of the steps."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the steps."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def modes(results: Sequence[Line], **wanted: Any) -> list[Side]:
    """Return every mode of the runs whose fields are as wanted."""
    own = [r for r in results if all(r[name] == value for name, value in wanted.items())]
    found = []
    for mode in dict.fromkeys(r["mode"] for r in own):
        runs = [r for r in own if r["mode"] == mode]
        steps = tuple(s for r in runs for s in r["seconds"])
        tokens = statistics.mean(t for r in runs for t in r["tokens"])
        found.append(Side(mode, steps, statistics.median(r["peak_bytes"] for r in runs), tokens))
    return found


def side(results: Sequence[Line], *, among: Container[str] | None = None, **wanted: Any) -> tuple[Side, float] | None:
    """Return the faster mode, and the peak of the smaller one, of all or of those `among`; None for no runs."""
    found = [one for one in modes(results, **wanted) if among is None or one.mode in among]
    return (min(found, key=lambda one: one.median), min(one.peak for one in found)) if found else None


def speed(results: Sequence[Line]) -> str:
    """Return the comparison with TRL.

    The times are beside the faster of its defaults and its best, the memory beside the smaller; then the times beside
    what was tuned to the case, where that is faster still.

    KDRL, which TRL does not have, is beside the sum of TRL's GRPO and distillation steps, and the larger memory. Tokens
    are those of a step, ours first; both sides sample, so where completions end by chance they differ, and the times
    *per token* with them.
    """
    heads = (
        "case", "method", "distillkit, s", "TRL, s", "times faster", "per token", "TRL tuned, s", "times",
        "distillkit, GiB", "TRL, GiB", "share", "tokens",
    )  # fmt: skip
    rows = []
    for case in CASES:
        for method in METHODS:
            own = side(results, case=case, method=method, side="distillkit")
            of = PEERS if method == "kdrl" else (method,)
            plain = _found(side(results, among=PLAIN, case=case, method=name, side="trl") for name in of)
            every = _found(side(results, case=case, method=name, side="trl") for name in of)
            if own is None or len(plain) < len(of):
                continue
            seconds, least = (sum(one.median for one, _ in found) for found in (plain, every))
            mine, peak = own[0].median, max(peak for _, peak in plain)
            name = "kdrl (TRL: grpo + distil)" if method == "kdrl" else f"{method} (TRL {plain[0][0].mode})"
            theirs = f"{seconds:.2f}" if method == "kdrl" else _spread(plain[0][0])
            tuned = (f"{least:.2f}", f"{least / mine:.2f}") if least < seconds else ("—", "—")
            gib = [f"{value / 2**30:.2f}" for value in (own[1], peak)]
            tokens = ", ".join(f"{one.tokens:.0f}" for one in (own[0], *(found for found, _ in plain)))
            per_token = sum(one.median / one.tokens for one, _ in plain) / (mine / own[0].tokens)
            times = (f"**{seconds / mine:.2f}**", f"{per_token:.2f}", *tuned)
            rows.append((case, name, _spread(own[0]), theirs, *times, *gib, f"{own[1] / peak:.2f}", tokens))
    return markdown(heads, rows)


def _found(sides: Iterable[tuple[Side, float] | None]) -> list[tuple[Side, float]]:
    return [one for one in sides if one is not None]


def _spread(one: Side) -> str:
    low, high = one.quartiles
    return f"{one.median:.2f} ({low:.2f} to {high:.2f})"


def floors(results: Sequence[Line], case: str, method: str) -> tuple[dict[str, float], dict[str, float]] | None:
    """Return the least and the measured seconds of each phase of our runs; None where there are none.

    The floor of a run has its own length of completions and its own rate of a matrix product; both are medians over
    the runs. `rest` is what a step takes outside the three phases.
    """
    own = [r for r in results if (r["case"], r["method"], r["side"]) == (case, method, "distillkit")]
    if not own:
        return None
    least = [
        floor(CASES[case], method, statistics.mean(r["tokens"]) / r["rollouts"]).seconds(r["flops_per_second"])
        for r in own
    ]
    low = {phase: statistics.median(run[phase] for run in least) for phase in PHASES}
    steps = [dict(zip(r["phases"], row, strict=True)) for r in own for row in zip(*r["phases"].values(), strict=True)]
    took = {phase: statistics.median(one.get(phase, 0.0) for one in steps) for phase in PHASES[:-1]}
    took["step"] = statistics.median(s for r in own for s in r["seconds"])
    took["rest"] = max(0.0, took["step"] - sum(took[phase] for phase in PHASES[:-1]))
    return low, took


def distances(results: Sequence[Line], reasons: dict[str, str]) -> str:
    """Return how far every phase is from its floor; `reasons` by "case phase", or by "phase" for every case."""
    rows = []
    for case in CASES:
        for method in METHODS:
            found = floors(results, case, method)
            for phase in PHASES if found is not None else ():
                assert found is not None
                low, took = found[0][phase], found[1][phase]
                if not low:
                    continue
                reason = next(
                    reasons[key] for key in (f"{case} {method} {phase}", f"{case} {phase}", phase) if key in reasons
                )
                rows.append((case, method, phase, f"{low:.3f}", f"{took:.3f}", f"{took / low:.1f}", reason))
    return markdown(("case", "method", "phase", "floor, s", "measured, s", "times the floor", "what remains"), rows)


def kdrl(results: Sequence[Line]) -> str:
    """Return KDRL beside GRPO, with a teacher of the student's size."""
    rows = []
    for case in dict.fromkeys(r["case"] for r in results):
        found = [side(results, case=case, method=method) for method in ("grpo", "kdrl")]
        grpo, both = (one[0] for one in found if one is not None)
        rows.append((case, _spread(grpo), _spread(both), f"**{both.median / grpo.median:.2f}**"))
    return markdown(("case", "GRPO, s", "KDRL, s", "times"), rows)
