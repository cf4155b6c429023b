"""What the framework itself costs: a step whose sampler and teacher are fakes and whose model is next to nothing.

    python benchmarks/overhead.py measure [--rollouts 1 8 64 256 512] [--rounds 3] [--resume]
    python benchmarks/overhead.py table

A step is timed as a user waits for it: from its start to the start of the next, data, logging and callbacks included.
What the model takes is taken off: its layers and its head, the backward pass, the optimizer. The fakes are not: what
they take counts as the framework's. One rollout is distilled alone (a group of one has no baseline), more are KDRL.
Each point is a process of its own; a profile of each comes last.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import RESULTS, Record, lines, measured

RECORD = RESULTS / "overhead.jsonl"
ROLLOUTS = (1, 8, 64, 256, 512)
PER_STEP, PER_ROLLOUT = 10e-3, 0.2e-3
"""Seconds that a step may take outside the model, and more for each of its rollouts."""
_KEY = ("do", "rollouts", "round")
_COMPLETIONS = ("2", "4", "11", "too long")


class Timed:
    """Calls a function and adds up the seconds that it takes; calls within calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return timed


def run(rollouts: int, steps: int, warm_up: int, folder: Path, profile: cProfile.Profile | None = None) -> list[Any]:
    """Train `warm_up + steps` steps; return seconds of each of the last `steps`: whole, and in the model."""
    import lightning.pytorch as pl
    import torch
    from step import ByChance

    import distillkit as dk
    from distillkit.testing import fakes

    group = min(rollouts, 8)
    fakes.tiny_model().save_pretrained(folder / "student")
    fakes.char_tokenizer().save_pretrained(folder / "student")
    rows = [{"prompt": f"{i}+{j}="} for i in range(10) for j in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, marks = Timed(), []

    class Marks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if not marks:
                inner = module.scorer.model
                for layer in (inner.base_model, inner.get_output_embeddings()):
                    layer.forward = model(layer.forward)
                module.manual_backward = model(module.manual_backward)
                for optimizer in trainer.optimizers:
                    optimizer.step = model(optimizer.step)
            marks.append((time.perf_counter(), model.seconds))
            if profile is not None and len(marks) == warm_up + 1:
                profile.enable()
            if profile is not None and len(marks) == warm_up + steps + 1:
                profile.disable()

    parts: dict[str, Any] = {"objective": dk.GRPO(), "rewards": [ByChance()]} if group > 1 else {}
    module = dk.OnPolicyDistillation(
        student=str(folder / "student"), sampler=fakes.FakeSampler(group_size=group, completions=_COMPLETIONS),
        teacher=fakes.FakeTeacher(), divergence=dk.K2(), beta=0.2, validate_at_start=False, **parts,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    )  # fmt: skip
    data = dk.PromptData(
        train=dk.DataSource(path=str(folder / "prompts.jsonl")), prompts_per_step=rollouts // group, shuffle=False
    )
    trainer = dk.make_trainer(
        folder / "run", callbacks=[Marks()], accelerator="cpu", max_steps=warm_up + steps + 1, checkpoint_every=1000,
        rollouts_every=1000, enable_progress_bar=False,
    )  # fmt: skip
    pl.seed_everything(1)
    trainer.fit(module, datamodule=data)
    found = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]
    return found[warm_up : warm_up + steps]


def measure(rollouts: int, steps: int, warm_up: int) -> dict[str, Any]:
    """Return the seconds of each step: whole, in the model, and the rest."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(rollouts, steps, warm_up, Path(folder))
    outside = [whole - model for whole, model in found]
    return {"rollouts": rollouts, "seconds": [w for w, _ in found], "model": [m for _, m in found], "outside": outside}


def entries(rollouts: int, steps: int, warm_up: int, count: int = 10) -> list[dict[str, Any]]:
    """Return the `count` functions with the most time of their own in a step, milliseconds and calls per step."""
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        run(rollouts, steps, warm_up, Path(folder), profile)
    found = vars(pstats.Stats(profile))["stats"]
    rows = sorted(found.items(), key=lambda item: -item[1][2])[:count]
    return [
        {"function": _named(*key), "calls": calls / steps, "own_ms": 1e3 * own / steps, "whole_ms": 1e3 * whole / steps}
        for key, (_, calls, own, whole, _) in rows
    ]


def _named(file: str, line: int, function: str) -> str:
    """A short name: the path from its package on, or what a built-in calls itself."""
    if file == "~":
        return function.strip("<>").removeprefix("built-in ")
    parts = Path(file).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else -2
    if "distillkit" in parts and start < 0:
        start = len(parts) - 1 - parts[::-1].index("distillkit")
    return f"{'/'.join(parts[start:])}:{line} {function}"


def medians(results: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Return the median over all rounds' steps by the number of rollouts, seconds."""
    points = [r for r in results if r["do"] == "point"]
    return {
        n: statistics.median(s for r in points if r["rollouts"] == n for s in r[name])
        for n in sorted({r["rollouts"] for r in points})
    }


def fit(results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the seconds per step and per rollout outside the model: least squares over the medians."""
    outside = medians(results, "outside")
    slope, intercept = statistics.linear_regression([float(n) for n in outside], list(outside.values()))
    return intercept, slope


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    heads = ["rollouts", "whole step, ms", "in the model, ms", "outside, ms", "may take, ms"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    whole, model, outside = (medians(results, name) for name in ("seconds", "model", "outside"))
    for n in whole:
        most = PER_STEP + PER_ROLLOUT * n
        word = "" if outside[n] <= most else " (over)"
        cells = [f"{1e3 * value:.1f}" for value in (whole[n], model[n], outside[n], most)]
        rows.append(f"| {n} | {' | '.join(cells)}{word} |")
    return "\n".join(rows)


def profiled(line: dict[str, Any]) -> str:
    """Return the Markdown table of a profile; a profiled step is slower than one that is not."""
    rows = ["| function | calls per step | own time, ms | with what it calls, ms |", "|---|---|---|---|"]
    for e in line["entries"]:
        rows.append(f"| `{e['function']}` | {e['calls']:.0f} | {e['own_ms']:.2f} | {e['whole_ms']:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Measure and profile, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "point", "profile", "table"])
    parser.add_argument("--rollouts", type=int, nargs="+", default=ROLLOUTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--resume", action="store_true", help="go on with the record")
    given = parser.parse_args()
    if given.do in ("point", "profile"):
        from surroundings import surroundings

        where = surroundings()
        n, sizes = given.rollouts[0], (given.steps, given.warm_up)
        found = measure(n, *sizes) if given.do == "point" else {"rollouts": n, "entries": entries(n, *sizes)}
        print(json.dumps({**found, **where}))
        return
    if given.do == "measure":
        record = Record(given.record, _KEY, resume=given.resume)
        sizes = ("--steps", str(given.steps), "--warm-up", str(given.warm_up))
        for do, rounds in (("point", given.rounds), ("profile", 1)):
            for turn in range(rounds):
                for n in given.rollouts:
                    key = {"do": do, "rollouts": n, "round": turn}
                    if not record.has(**key):
                        own = (sys.executable, __file__, do, "--rollouts", str(n), *sizes)
                        record.add({**measured(own, given.threads), **key})
    results = lines(given.record)
    print(table(results))
    for line in results:
        if line["do"] == "profile":
            print(f"\n{line['rollouts']} rollouts\n\n{profiled(line)}")


if __name__ == "__main__":
    main()
