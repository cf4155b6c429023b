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
from pathlib import Path

METHODS = {
    "GRPO alone": ["--model.teacher", "null", "--model.divergence", "null"],
    "distillation alone (k2)": ["--model.objective", "null"],
    "KDRL (GRPO + k2)": [],
    "RLAD (TRRD)": ["--model.objective", "trrd", "--model.divergence", "null"],
}
METRIC = "val/held_out/pass@1"


def run(folder: Path, name: str, seed: int, threads: int) -> tuple[float, float, float]:
    """Return start, end and seconds of one run."""
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
    scores = [float(row[METRIC]) for row in rows if row.get(METRIC)]
    return scores[0], scores[-1], sum(float(row["time/step"]) for row in rows if row["time/step"])


def main() -> None:
    """Run what is missing and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    given = parser.parse_args()
    threads = max((os.cpu_count() or 1) // max(given.jobs, 1), 1)
    pairs = [(name, seed) for seed in given.seeds for name in METHODS]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: run(given.folder, *pair, threads), pairs), strict=True))
    print(f"| method | start | end (mean ± sd of seeds {', '.join(map(str, given.seeds))}) | gain | seconds in steps |")
    print("|---|---|---|---|---|")
    for name in METHODS:
        starts, ends, seconds = zip(*(found[name, seed] for seed in given.seeds), strict=True)
        start, end = statistics.mean(starts), statistics.mean(ends)
        spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
        gain = 100 * (end - start)
        print(f"| {name} | {start:.3f} | {end:.3f} ± {spread:.3f} | {gain:+.1f} | {statistics.mean(seconds):.0f} |")


if __name__ == "__main__":
    main()
