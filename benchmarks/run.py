"""Measure distillkit's step beside TRL's trainers, in turn, and write docs/performance.md.

    python benchmarks/run.py measure --trl PYTHON [--cases fixed tail] [--rounds 2] [--resume]
    python benchmarks/run.py kdrl [--resume]    # KDRL beside GRPO, teacher and student of one size, nothing skipped
    python benchmarks/run.py table              # of what is on record
    python benchmarks/run.py report             # from all records: also those of kinds, switches, growth, overhead

PYTHON is that of an environment with trl. One run after the other, never two at a time: distillkit, TRL as it comes,
TRL at its best (no gradient checkpointing, its largest batch), TRL tuned to the case where that was found to be faster
(peers/tuned.py), and again. Both sides get the same checkpoints, prompts, rewards, limits, dtype and threads. A pair
that did not do the same work (rollouts, tensors updated, tokens but for chance, as both sample) is an error, no row.
Each round has its own seed.
Every run is written down as soon as it is through; with --resume those are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES, COMPARED, Case
from limit import relative_spread
from measuring import RESULTS, ROOT, Record, lines, measured, write_inputs_apart
from peers.tuned import TUNED
from performance.tables import kdrl, speed

RECORD, KDRL = RESULTS / "speed.jsonl", RESULTS / "kdrl.jsonl"
METHODS = ("grpo", "distil", "kdrl")
PEERS = {"grpo": "trl_grpo.py", "distil": "trl_distillation.py"}
MODES = ("default", "best", "tuned")
SAME_SIZE = ("fixed_same", "long")
"""Cases whose teacher is as large as the student."""
_KEY = ("case", "method", "side", "mode", "round")
_TOKENS = 0.1
_WARM_UP = 2


@dataclass(frozen=True)
class Turn:
    """One run: `mode` is TRL's, and empty on our side."""

    case: str
    method: str
    side: str
    mode: str
    steps: int
    command: tuple[str, ...]


def ours(case: str, method: str, steps: int, *settings: str) -> Turn:
    """Return a run of distillkit's step."""
    command = (sys.executable, str(ROOT / "benchmarks" / "step.py"), "--case", case, "--method", method)
    more = ("--set", *settings) if settings else ()
    return Turn(case, method, "distillkit", "", steps, (*command, *_steps(steps), *more))


def turns(case: str, trl: str, steps: int, modes: Sequence[str] = MODES) -> Iterator[Turn]:
    """Yield the runs of one round on one case."""
    for method in METHODS:
        yield ours(case, method, steps)
        for mode in modes if method in PEERS else ():
            if mode == "tuned" and (case, method) not in TUNED:
                continue
            peer = str(ROOT / "benchmarks" / "peers" / PEERS[method])
            command = (trl, peer, "--mode", mode, "--case", case, *_steps(steps))
            yield Turn(case, method, "trl", mode, steps, command)


def _steps(steps: int) -> tuple[str, ...]:
    return "--steps", str(steps), "--warm-up", str(_WARM_UP)


def go(every: Sequence[Turn], rounds: int, threads: int, record: Record) -> None:
    """Run all turns of a round on one case, then those of the next, but for those on record."""
    with tempfile.TemporaryDirectory() as folder:
        for turn, one in itertools.product(range(rounds), every):
            key = {"case": one.case, "method": one.method, "side": one.side, "mode": one.mode, "round": turn}
            if record.has(**key):
                continue
            if not any(Path(folder).iterdir()):
                write_inputs_apart(one.case, _WARM_UP + one.steps, Path(folder))
            command = (*one.command, "--seed", str(1 + turn), "--inputs", folder)
            record.add({**measured(command, threads), **key})


def check_same_work(results: Sequence[dict[str, Any]]) -> None:
    """Raise SystemExit where two sides of one case and method did not do the same."""
    for case, method in {(r["case"], r["method"]) for r in results}:
        own = [r for r in results if (r["case"], r["method"]) == (case, method)]
        tokens = [statistics.mean(r["tokens"]) for r in own]
        apart = max(tokens) > (1 + token_tolerance(CASES[case], own)) * min(tokens)
        if len({(r["rollouts"], r["moved"]) for r in own}) > 1 or apart:
            what = [(r["side"], r["mode"], r["rollouts"], r["moved"], statistics.mean(r["tokens"])) for r in own]
            raise SystemExit(f"{case}, {method}: not the same work: {what}")


def token_tolerance(case: Case, runs: Sequence[dict[str, Any]]) -> float:
    """Return by how much the tokens of two runs may differ: four standard errors, where completions end by chance."""
    steps = min(len(r["tokens"]) for r in runs)
    error = relative_spread(case) / math.sqrt(case.rollouts * steps)
    return max(_TOKENS, 4 * math.sqrt(2) * error)


def main() -> None:
    """Measure, or write down what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "kdrl", "table", "report"])
    parser.add_argument("--trl", help="Python of an environment with trl")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all that the sub-command has")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of TRL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, help="default: in benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="go on with the record")
    given = parser.parse_args()
    if given.do == "report":
        from performance.report import write_report  # matplotlib

        write_report(RESULTS, ROOT / "docs")
        return
    path = given.record or (KDRL if given.do == "kdrl" else RECORD)
    if given.do == "kdrl":
        record = Record(path, _KEY, resume=given.resume)
        for case in given.cases or SAME_SIZE:
            own = [ours(case, method, given.steps, "skip_zero_weight=false") for method in ("grpo", "kdrl")]
            go(own, given.rounds, given.threads, record)
    if given.do == "measure":
        if given.trl is None:
            parser.error("measure: --trl PYTHON, of an environment with trl")
        record = Record(path, _KEY, resume=given.resume)
        for case in given.cases or COMPARED:
            go(list(turns(case, given.trl, given.steps, given.modes)), given.rounds, given.threads, record)
    results = lines(path)
    check_same_work(results)
    print(kdrl(results) if given.do == "kdrl" else speed(results))


if __name__ == "__main__":
    main()
