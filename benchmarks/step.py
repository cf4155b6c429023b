"""Run distillkit's step on one case and time its phases.

    python benchmarks/step.py --case fixed --method kdrl [--steps 5] [--warm-up 2] [--set NAME=VALUE ...]
    (such as skip_zero_weight=false, sampler.rows_per_batch=16, teacher.dtype=bfloat16)

Prints one line of JSON: seconds of each step and phase, rollouts, sampled tokens, how many tensors were updated, and
where it ran.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from cases import CASES, Case, reward, write_inputs
from surroundings import surroundings

import distillkit
from distillkit import GRPO, K2, DataSource, HFSampler, LocalTeacher, OnPolicyDistillation, PromptData, make_trainer
from distillkit.components import RewardFn
from distillkit.divergences.full import ReverseKL
from distillkit.maskers.response_level import ResponseLevel
from distillkit.types import RewardOutput, RolloutBatch

METHODS = ("grpo", "distil", "kdrl")


class ByChance(RewardFn):
    """The reward of `cases.py`."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        found = [reward(prompt, text) for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)]
        return RewardOutput.single("by_chance", found, correct=[bool(value) for value in found])


class Stopwatch(pl.Callback):
    """Wall-clock seconds of every step, from its start to the start of the next, as a user waits for them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def build(case: Case, method: str, folder: Path, settings: dict[str, Any]) -> OnPolicyDistillation:
    """Return the module of one method on the models in `folder`.

    `sampler.NAME` and `teacher.NAME` of `settings` are arguments of those, what concerns a part that the method does
    not have is left out.
    """
    parts: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {"model": {}, "sampler": {}, "teacher": {}}
    for name, value in settings.items():
        part, _, argument = name.rpartition(".")
        own[part or "model"][argument] = value
    if method != "grpo":
        parts["teacher"] = LocalTeacher(path=str(folder / "teacher"), **own["teacher"])
        parts["divergence"] = ReverseKL() if method == "distil" else K2()
        parts["beta"] = 1.0 if method == "distil" else 0.2
    if method != "distil":
        parts["objective"], parts["rewards"] = GRPO(), [ByChance()]
    if method == "kdrl" and case.masked:
        parts["masker"] = ResponseLevel()
    sampler = HFSampler(group_size=case.group_size, max_new_tokens=case.new_tokens, **own["sampler"])
    return OnPolicyDistillation(
        student=str(folder / "student"), sampler=sampler, **parts, **own["model"], validate_at_start=False,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    )  # fmt: skip


def measure(
    case: Case,
    method: str,
    *,
    steps: int,
    warm_up: int,
    settings: dict[str, Any],
    folder: Path,
    inputs: Path | None = None,
    seed: int = 1,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, Any]:
    """Train `warm_up + steps` steps in `folder` and return what the last `steps` took.

    `settings` are those of `build`; where the case has the same, they win. `inputs` is where `write_inputs` wrote; None
    for it to be done first, in `folder`.
    """
    pl.seed_everything(seed)
    if inputs is None:
        inputs = folder
        write_inputs(case, inputs, warm_up + steps)
    settings = {**case.settings, **settings}
    module = build(case, method, inputs, settings)
    watch = Stopwatch()
    data = PromptData(
        train=DataSource(path=str(inputs / "prompts.jsonl")), prompts_per_step=case.groups, shuffle=False,
        max_prompt_tokens=case.prompt_tokens,
    )  # fmt: skip
    trainer = make_trainer(
        folder / "run", callbacks=[watch, *callbacks], accelerator="cpu", max_steps=warm_up + steps,
        checkpoint_every=1000, rollouts_every=1000, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    with (folder / "run" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["time/step"]][warm_up:]
    phases = [name for name in rows[0] if name.startswith("time/")]
    lengths = [float(row["train/completion_length"]) for row in rows]
    return {
        "side": "distillkit", "case": case.name, "method": method, "settings": settings,
        "seconds": watch.seconds[warm_up:],
        "phases": {name.removeprefix("time/"): [float(row[name] or 0) for row in rows] for name in phases},
        "rollouts": case.rollouts,
        "tokens": [round(length * case.rollouts) for length in lengths],
        "moved": _moved(inputs / "student", folder / "run" / "student"),
    }  # fmt: skip


def _moved(*folders: Path) -> int:
    """Return how many of the student's parameter tensors are not the same in two folders."""
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    return sum(not torch.equal(before[name], after[name]) for name in before)


def main() -> None:
    """Measure one case and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the module, its sampler., its teacher."
    )
    parser.add_argument("--inputs", type=Path, help="what cases.py wrote; default: written first, in this process")
    given = parser.parse_args()
    settings = {name: yaml.safe_load(value) for name, _, value in (entry.partition("=") for entry in given.set)}
    where = surroundings(distillkit=distillkit.__version__, lightning=pl.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(
            CASES[given.case], given.method, steps=given.steps, warm_up=given.warm_up, settings=settings,
            inputs=given.inputs, folder=Path(scratch), seed=given.seed,
        )  # fmt: skip
    print(json.dumps({**found, **where}))


if __name__ == "__main__":
    main()
