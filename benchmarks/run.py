"""Measure distillkit's step beside TRL's trainers, in turn, and print the table.

    python benchmarks/run.py measure --trl PYTHON [--cases fixed tail] [--rounds 2]
    python benchmarks/run.py report

PYTHON is that of an environment with trl. One run after the other, never two at a time: distillkit, TRL as it comes,
TRL at its best, and again. Both sides get the same checkpoints, prompts, rewards, limits, dtype and threads. A pair
that did not do the same work (rollouts, tensors updated, tokens within a tenth, for both sample) is an error, no row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import CASES
from strategies import descendants

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "speed.jsonl"
METHODS = ("grpo", "distil", "kdrl")
PEERS = {"grpo": "trl_grpo.py", "distil": "trl_distillation.py"}
_TOKENS = 0.1


def proportional(pid: int) -> int:
    """Return a process's share of the memory that it maps (PSS), bytes; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


def measured(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a command that prints a line of JSON last; add the peak memory of its process tree, bytes."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
    }  # fmt: skip
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while True:
        try:
            out, err = running.communicate(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, sum(proportional(pid) for pid in descendants(running.pid)))
    if running.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {running.returncode}\n{err[-3000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**found, "peak_bytes": peak}


def turns(case: str, trl: str, steps: int) -> list[list[str]]:
    """Return the commands of one round on one case."""
    common = ["--case", case, "--steps", str(steps)]
    found = []
    for method in METHODS:
        found.append([sys.executable, str(ROOT / "benchmarks" / "step.py"), "--method", method, *common])
        if method in PEERS:
            peer = str(ROOT / "benchmarks" / "peers" / PEERS[method])
            found += [[trl, peer, "--mode", mode, *common] for mode in ("default", "best")]
    return found


def check_same_work(results: Sequence[dict[str, Any]]) -> None:
    """Raise SystemExit where two sides of one case and method did not do the same."""
    for case, method in {(r["case"], r["method"]) for r in results}:
        own = [r for r in results if (r["case"], r["method"]) == (case, method)]
        tokens = [statistics.mean(r["tokens"]) for r in own]
        if len({(r["rollouts"], r["moved"]) for r in own}) > 1 or max(tokens) > (1 + _TOKENS) * min(tokens):
            what = [(r["side"], r["settings"], r["rollouts"], r["moved"], statistics.mean(r["tokens"])) for r in own]
            raise SystemExit(f"{case}, {method}: not the same work: {what}")


def seconds(results: Sequence[dict[str, Any]], case: str, method: str, side: str) -> tuple[float, int] | None:
    """Return the median step of the side's faster mode and the peak of its smaller one; None where it has neither."""
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        if (r["case"], r["method"], r["side"]) == (case, method, side):
            by_mode.setdefault(json.dumps(r["settings"]), []).append(r)
    if not by_mode:
        return None
    steps = [statistics.median(s for r in runs for s in r["seconds"]) for runs in by_mode.values()]
    peaks = [round(statistics.median(r["peak_bytes"] for r in runs)) for runs in by_mode.values()]
    return min(steps), min(peaks)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of all cases."""
    lines = [
        "| case | method | distillkit, s | TRL, s | times faster | distillkit, GiB | TRL, GiB | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        peers = {method: seconds(results, case, method, "trl") for method in PEERS}
        both = [found for found in peers.values() if found is not None]
        for method in METHODS:
            ours, theirs = seconds(results, case, method, "distillkit"), peers.get(method)
            name = method
            if method == "kdrl" and len(both) == len(PEERS):
                theirs, name = (sum(s for s, _ in both), max(p for _, p in both)), "kdrl (TRL: grpo + distil)"
            if ours is None or theirs is None:
                continue
            cells = [f"{ours[0]:.2f}", f"{theirs[0]:.2f}", f"{theirs[0] / ours[0]:.2f}"]
            cells += [f"{ours[1] / 2**30:.2f}", f"{theirs[1] / 2**30:.2f}", f"{ours[1] / theirs[1]:.2f}"]
            lines.append(f"| {case} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "report"])
    parser.add_argument("--trl", help="Python of an environment with trl")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    if given.do == "measure":
        if given.trl is None:
            parser.error("measure: --trl PYTHON, of an environment with trl")
        for case in given.cases:
            for turn in range(given.rounds):
                for command in turns(case, given.trl, given.steps):
                    start = time.time()
                    found = {**measured(command, given.threads), "round": turn, "started": round(start)}
                    with given.record.open("a") as stream:
                        stream.write(json.dumps(found) + "\n")
    results = [json.loads(line) for line in given.record.read_text().splitlines()]
    check_same_work(results)
    print(table(results))


if __name__ == "__main__":
    main()
