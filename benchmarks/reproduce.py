"""Compare the methods on step-by-step arithmetic, and write `docs/reproduction.md`.

    python benchmarks/reproduce.py tune     # four trials a method, half the budget, chosen on the validation set
    python benchmarks/reproduce.py run      # the chosen setting of every method, three seeds, the whole budget
    python benchmarks/reproduce.py time     # seconds per step, one run at a time on an otherwise idle machine
    python benchmarks/reproduce.py report   # docs/reproduction.md and its plots, from the results alone

Each run is `distillkit fit --config small/…` in a process of its own; it appends one JSON line to
`benchmarks/results/reproduction.jsonl` when it is done, and is not run again. Every method gets the same number of
completion tokens, sampled or given; the last step may go a little beyond.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from reproduction.measures import measure
from reproduction.methods import METHODS, SEEDS, TUNING_SEED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reproduction.jsonl"
BUDGET = 160_000
"""Completion tokens of a reported run; a trial has half."""
TIMED_STEPS, WARM_UP = 14, 4
"""Steps of a timing run, and those at its start that do not count."""

_VALIDATION, _HELD_OUT = "val/validation/pass@1", "val/held_out/pass@1"
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the matrix."""

    phase: str
    method: str
    seed: int
    trial: Mapping[str, float]

    @property
    def key(self) -> tuple[object, ...]:
        return (self.phase, self.method, self.seed, tuple(sorted(self.trial.items())))

    @property
    def name(self) -> str:
        values = "-".join(f"{value:g}" for value in self.trial.values())
        return f"{self.phase}-{self.method}-{values}-seed{self.seed}"


def results() -> list[dict[str, Any]]:
    """Return every finished run."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def pending(jobs: list[Job]) -> list[Job]:
    """Return the jobs that are not among the results."""
    done = {Job(**{k: row[k] for k in ("phase", "method", "seed", "trial")}).key for row in results()}
    return [job for job in jobs if job.key not in done]


def chosen(method: str) -> Mapping[str, float]:
    """Return the trial with the best validation accuracy at its end; the area under its curve decides ties."""
    rows = [row for row in results() if row["phase"] == "tune" and row["method"] == method]
    missing = len(METHODS[method].trials) - len(rows)
    if missing:
        raise SystemExit(f"{method}: {missing} trials are missing; run `reproduce.py tune` first")
    best = max(rows, key=lambda row: (row["validation"], row["area"]))
    trial: Mapping[str, float] = best["trial"]
    return trial


def execute(job: Job, folder: Path, threads: int) -> dict[str, Any]:
    """Run the stages of a job, measure the student, and return its line."""
    budget = BUDGET if job.phase == "run" else BUDGET // 2
    student, curve, seconds, tokens, steps = "embedded:student", [], 0.0, 0, 0
    stages = METHODS[job.method].stages
    for number, stage in enumerate(stages, start=1):
        target = folder / f"{job.name}-{number}"
        shutil.rmtree(target, ignore_errors=True)
        last = number == len(stages)
        settings = {
            "seed_everything": job.seed,
            "run_dir": target,
            "trainer.callbacks.init_args.completion_tokens": int(budget * stage.share),
            **stage.settings,
            **(job.trial if last else {}),
        }
        if student != "embedded:student":
            settings["model.student"] = student
        words = [word for path, value in settings.items() for word in (f"--{path}", str(value))]
        _fit(["fit", "--config", stage.recipe, *words], target, threads)
        rows = _metrics(target)
        curve += [
            [steps + int(row["step"]), tokens + used, float(row[_VALIDATION]), float(row[_HELD_OUT])]
            for used, row in rows
            if row.get(_VALIDATION) and (used or number == 1)
        ]
        timed = [float(row["time/step"]) for _, row in rows if row.get("time/step")]
        seconds, tokens, steps = seconds + sum(timed), tokens + rows[-1][0], steps + len(timed)
        student = str(target / "student")
    area = sum((a[2] + b[2]) / 2 * (b[1] - a[1]) for a, b in pairwise(curve)) / tokens
    line = {
        "phase": job.phase, "method": job.method, "seed": job.seed, "trial": dict(job.trial), "tokens": tokens,
        "steps": steps, "validation": curve[-1][2], "area": area, "curve": curve, "seconds": seconds,
    }  # fmt: skip
    return {**line, **(measure(Path(student)) if job.phase == "run" else {})}


def execute_timing(job: Job, folder: Path, threads: int) -> dict[str, Any]:
    """Run a few steps of a job's last stage from the embedded student, and return the median of their seconds."""
    target = folder / job.name
    shutil.rmtree(target, ignore_errors=True)
    settings = {
        "seed_everything": job.seed,
        "run_dir": target,
        "trainer.max_steps": TIMED_STEPS,
        "trainer.limit_val_batches": 0,
        **job.trial,
    }
    words = [word for path, value in settings.items() for word in (f"--{path}", str(value))]
    _fit(["fit", "--config", METHODS[job.method].stages[-1].recipe, *words], target, threads)
    timed = [float(row["time/step"]) for _, row in _metrics(target) if row.get("time/step")]
    seconds = statistics.median(timed[WARM_UP:])
    return {"phase": job.phase, "method": job.method, "seed": job.seed, "trial": dict(job.trial), "seconds": seconds}


def _fit(words: list[str], target: Path, threads: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_name(f"{target.name}.log")
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "distillkit", *words],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"distillkit {' '.join(words)}: exit {done.returncode}, see {log}")


def _metrics(target: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (completion tokens so far, row) for every row of metrics.csv."""
    with (target / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    used, found = 0, []
    for row in rows:
        used = int(float(row["train/completion_tokens"])) if row.get("train/completion_tokens") else used
        found.append((used, row))
    return found


def run_all(jobs: list[Job], folder: Path, workers: int) -> None:
    """Run what is missing, `workers` at a time; a run that fails is named and does not stop the others."""
    todo = pending(jobs)
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done, {len(todo)} to go", flush=True)
    threads = max((os.cpu_count() or 1) // workers, 1)
    started, finished = time.monotonic(), 0
    failed: list[str] = []

    def one(job: Job) -> None:
        nonlocal finished
        try:
            line = (execute_timing if job.phase == "time" else execute)(job, folder, threads)
        except Exception as error:
            with _lock:
                failed.append(f"{job.name}: {error}")
                print(f"FAILED {failed[-1]}", flush=True)
            return
        with _lock:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            finished += 1
            left = (time.monotonic() - started) / finished * (len(todo) - finished)
            print(
                f"[{finished}/{len(todo)}] {job.name}: {_headline(line)}, {left / 60:.0f} min left",
                flush=True,
            )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, todo))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed")


def _headline(line: Mapping[str, Any]) -> str:
    return f"{line['seconds']:.3f} s/step" if line["phase"] == "time" else f"validation {line['validation']:.3f}"


def tuning_jobs(methods: list[str]) -> Iterator[Job]:
    """Yield every trial of every method."""
    for method in methods:
        for trial in METHODS[method].trials:
            yield Job(phase="tune", method=method, seed=TUNING_SEED, trial=trial)


def reported_jobs(phase: str, methods: list[str]) -> Iterator[Job]:
    """Yield the chosen setting of every method, seed by seed."""
    for seed in SEEDS:
        for method in methods:
            yield Job(phase=phase, method=method, seed=seed, trial=chosen(method))


def main() -> None:
    """Run a phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["tune", "run", "time", "report"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, the cores are shared among them")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "reproduction", help="where the runs go")
    given = parser.parse_args()
    if given.phase == "tune":
        run_all(list(tuning_jobs(given.methods)), given.folder, given.jobs)
    elif given.phase == "run":
        run_all(list(reported_jobs("run", given.methods)), given.folder, given.jobs)
    elif given.phase == "time":
        run_all(list(reported_jobs("time", given.methods)), given.folder, workers=1)
    else:
        from reproduction.report import write_report

        write_report(results(), ROOT / "docs", BUDGET)


if __name__ == "__main__":
    main()
