"""Run the quickstart and its three relatives over seeds, and print the README's table.

    python benchmarks/quickstart.py [--seeds 1 2 3] [--jobs 2] [--folder runs/benchmark]

A run that is finished is not run again. Each run is `distillkit fit --config quickstart` with the arguments below: one
start, one learning rate, one number of rollouts for all.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

METHODS = {
    "GRPO alone": ["--model.teacher", "null", "--model.divergence", "null"],
    "distillation alone (k2)": ["--model.objective", "null"],
    "KDRL (GRPO + k2)": [],
    "RLAD (TRRD)": ["--model.objective", "trrd", "--model.divergence", "null"],
}
METRIC = "val/held_out/pass@1"


@dataclass(frozen=True)
class Result:
    """Held-out accuracy by step, and the seconds that the steps took."""

    accuracy: dict[int, float]
    seconds: float


def run(folder: Path, name: str, seed: int, threads: int) -> Result:
    """Run one method with one seed, unless it is done already, and read what it logged."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    target = folder / f"{slug}-{seed}"
    if not (target / "student" / "config.json").exists():
        arguments = ["fit", "--config", "quickstart", "--seed_everything", str(seed), "--run_dir", str(target)]
        subprocess.run(
            [sys.executable, "-m", "distillkit", *arguments, *METHODS[name]],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
        )
    with (target / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return Result(
        accuracy={int(row["step"]): float(row[METRIC]) for row in rows if row.get(METRIC)},
        seconds=sum(float(row["time/step"]) for row in rows if row["time/step"]),
    )


def table(found: dict[tuple[str, int], Result], seeds: list[int]) -> str:
    """Return a Markdown table: accuracy at some steps, mean over seeds (± sd at the end), and seconds in steps."""
    steps = sorted(next(iter(found.values())).accuracy)
    heads = ["method", *(f"step {step}" for step in steps), "seconds in steps"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in METHODS:
        results = [found[name, seed] for seed in seeds]
        cells = [f"{statistics.mean(r.accuracy[step] for r in results):.3f}" for step in steps]
        spread = statistics.stdev(r.accuracy[steps[-1]] for r in results) if len(results) > 1 else 0.0
        cells[-1] += f" ± {spread:.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(r.seconds for r in results):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    given = parser.parse_args()
    threads = max((os.cpu_count() or 1) // given.jobs, 1)
    pairs = [(name, seed) for seed in given.seeds for name in METHODS]
    with ThreadPoolExecutor(given.jobs) as pool:
        results = pool.map(lambda pair: run(given.folder, *pair, threads), pairs)
        print(table(dict(zip(pairs, results, strict=True)), given.seeds))


if __name__ == "__main__":
    main()
