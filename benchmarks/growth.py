"""How a step's time and memory grow with each size of its work: x1, x2, x4 and x8 of one base.

    python benchmarks/growth.py measure [--rounds 2] [--resume]
    python benchmarks/growth.py table

The base is the case `growth`: KDRL with a student and a teacher of 1 M parameters in the layers (hidden 128), 8 groups
of 4 rollouts, a prompt of 64 tokens and 64 new ones, a vocabulary of 8,192. It is small, so that x8 of every size fits
into a minute or so and a few gigabytes, and large enough that matrix products and not fixed costs take most of it.
The axes:

* rollouts: more groups of the same size, so more prompts too;
* new tokens, vocabulary: as they say;
* group size: more rollouts for each of the same prompts, so more rollouts and not more prompts;
* head chunk: token positions per call of the head, of student and teacher; the work stays the same.

Each point is a process of its own. Linear or better: the exponent, the slope of log cost over log work, is at most 1.
The marginal cost, of a unit of work added between x4 and x8 over one added between x1 and x4, has no fixed costs in it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cases import CASES, Case
from limit import floor
from measuring import RESULTS, Record, lines, measured

RECORD = RESULTS / "growth.jsonl"
AXES = ("rollouts", "new tokens", "vocabulary", "group size", "head chunk")
FACTORS = (1, 2, 4, 8)
CHUNK = 256
TOLERANCE = 1.1
_KEY = ("axis", "factor", "round")


def at(base: Case, axis: str, factor: int) -> tuple[Case, dict[str, Any]]:
    """Return the case and the settings of a point."""
    fields = {"rollouts": "groups", "new tokens": "new_tokens", "vocabulary": "vocabulary", "group size": "group_size"}
    if axis == "head chunk":
        return base, {"head_chunk": CHUNK * factor, "teacher.head_chunk": CHUNK * factor}
    return replace(base, **{fields[axis]: getattr(base, fields[axis]) * factor}), {}


def point(base: Case, axis: str, factor: int, steps: int, warm_up: int) -> dict[str, Any]:
    """Measure one point in this process."""
    from step import measure

    case, settings = at(base, axis, factor)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(case, "kdrl", steps=steps, warm_up=warm_up, settings=settings, folder=Path(folder))
    flops = floor(case, "kdrl", case.new_tokens)
    return {**found, "axis": axis, "factor": factor, "flops": flops.rollout + flops.teacher + flops.update}


@dataclass(frozen=True)
class Growth:
    """How one figure grows along an axis.

    Attributes:
        values: at x1, x2, x4, x8.
        exponent: slope of log value over log factor (least squares).
        marginal: what a unit costs between x4 and x8, over what it costs between x1 and x4; None where x4 costs no more
            than x1.
    """

    values: tuple[float, ...]
    exponent: float
    marginal: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Growth:
        """Return the growth of the values at `FACTORS`."""
        logs = [math.log(value) for value in values]
        exponent = statistics.linear_regression([math.log(f) for f in FACTORS], logs).slope
        first, _, third, last = values
        early = (third - first) / (FACTORS[2] - FACTORS[0])
        late = (last - third) / (FACTORS[3] - FACTORS[2])
        return Growth(tuple(values), exponent, late / early if early > 0 else None)


def growths(results: Sequence[dict[str, Any]], axis: str) -> dict[str, Growth]:
    """Return how seconds, bytes and FLOPs grow along an axis.

    The bytes are those above a process that has imported everything.
    """
    imported = statistics.median(r["peak_bytes"] for r in results if r["axis"] == "imports")
    at_factor = [[r for r in results if (r["axis"], r["factor"]) == (axis, factor)] for factor in FACTORS]
    return {
        "seconds": Growth.of([statistics.median(s for r in runs for s in r["seconds"]) for runs in at_factor]),
        "bytes": Growth.of([statistics.median(r["peak_bytes"] for r in runs) - imported for runs in at_factor]),
        "flops": Growth.of([runs[0]["flops"] for runs in at_factor]),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    heads = ["grows", "figure", *(f"×{factor}" for factor in FACTORS), "exponent", "marginal", "of the FLOPs", "linear"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for axis in AXES:
        found = growths(results, axis)
        for name, unit, figure in (("seconds", 1.0, "step, s"), ("bytes", 2.0**30, "memory, GiB")):
            own, constant = found[name], axis == "head chunk"
            values = [f"{value / unit:.2f}" for value in own.values]
            # No work is added along the chunk's axis: there a unit's cost is noise, and the step must not grow at all.
            times = own.values[-1] / own.values[0]
            linear = times <= TOLERANCE if constant and name == "seconds" else round(own.exponent, 2) <= 1
            word = "or better" if linear else f"{times:.2f} ×"
            marginals = [found[key].marginal for key in (name, "flops")]
            shown = ["—" if constant or one is None else f"{one:.2f}" for one in marginals]
            rows.append(f"| {axis} | {figure} | {' | '.join([*values, f'{own.exponent:.2f}', *shown, word])} |")
    return "\n".join(rows)


def measure(base: str, rounds: int, steps: int, warm_up: int, threads: int, record: Record) -> None:
    """Measure every point that is not on record; x1 of all axes but the chunk's is the same point, measured once."""
    program = (sys.executable, str(Path(__file__)))
    for turn in range(rounds):
        if not record.has(axis="imports", factor=0, round=turn):
            imports = (sys.executable, "-c", "import step; print('{}')")
            record.add({**measured(imports, threads), "axis": "imports", "factor": 0, "round": turn})
        shared: dict[str, Any] | None = None
        for factor in FACTORS:
            for axis in AXES:
                if record.has(axis=axis, factor=factor, round=turn):
                    continue
                same = factor == 1 and axis != "head chunk"
                if same and shared is not None:
                    record.add({**shared, "axis": axis, "round": turn})
                    continue
                sizes = ("--axis", axis, "--factor", str(factor), "--steps", str(steps), "--warm-up", str(warm_up))
                found = measured((*program, "point", "--base", base, *sizes), threads)
                record.add({**found, "round": turn})
                shared = found if same else shared


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "point", "table"])
    parser.add_argument("--base", choices=list(CASES), default="growth")
    parser.add_argument("--axis", choices=AXES, default=AXES[0], help="of a point")
    parser.add_argument("--factor", type=int, default=1, help="of a point")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--resume", action="store_true", help="go on with the record")
    given = parser.parse_args()
    if given.do == "point":
        from surroundings import surroundings

        where = surroundings()
        found = point(CASES[given.base], given.axis, given.factor, given.steps, given.warm_up)
        print(json.dumps({**found, **where}))
        return
    if given.do == "measure":
        record = Record(given.record, _KEY, resume=given.resume)
        measure(given.base, given.rounds, given.steps, given.warm_up, given.threads, record)
    print(table(lines(given.record)))


if __name__ == "__main__":
    main()
