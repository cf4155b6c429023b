"""What both TRL trainers share: settings, clock, and the line of JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
import yaml
from cases import CASES, Case, prompts, write_inputs
from datasets import Dataset
from peers.tuned import TUNED
from safetensors.torch import load_file
from surroundings import surroundings
from transformers import TrainerCallback

_DEFAULT_BATCH = 8


class Stopwatch(TrainerCallback):
    """Seconds of every optimizer step, generation included, and what the trainer logs."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lengths: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "completions/mean_length" in logs:
            self.lengths.append(float(logs["completions/mean_length"]))


def settings(case: Case, steps: int, mode: str, more: dict[str, Any]) -> dict[str, Any]:
    """Arguments of either config: as TRL comes, or without gradient checkpointing in one batch; then `more`.

    `batch` in `more` is the number of sequences that are learned from at once.
    """
    own = {} if mode == "default" else {"gradient_checkpointing": False}
    batch = case.batch(more.get("batch", _DEFAULT_BATCH if mode == "default" else case.rollouts))
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": case.rollouts // batch, "max_completion_length": case.new_tokens,
        "max_steps": steps, "learning_rate": 1e-6, "temperature": 1.0, "use_cpu": True, "bf16": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "shuffle_dataset": False, **own, **{name: value for name, value in more.items() if name != "batch"},
    }  # fmt: skip


def rows(case: Case, steps: int, *, copies: int = 1) -> Dataset:
    """The prompts of all steps; a trainer without groups gets each as often as the group is large."""
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts(case, steps) for _ in range(copies)])


def run(name: str, build: Callable[[Case, Path, int, str, dict[str, Any]], Any]) -> None:
    """Measure the trainer that `build(case, folder, steps, mode, further settings)` makes; print a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--mode", choices=["default", "best", "tuned"], default="best")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of the config")
    parser.add_argument("--inputs", type=Path, help="what cases.py wrote; default: written first, in this process")
    given = parser.parse_args()
    more = {name: yaml.safe_load(value) for name, _, value in (entry.partition("=") for entry in given.set)}
    if given.mode == "tuned":
        more = {**TUNED[given.case, name], **more}
    more = {"seed": given.seed, **more}
    where = surroundings(trl=trl.__version__)
    case, total = CASES[given.case], given.warm_up + given.steps
    with tempfile.TemporaryDirectory() as scratch:
        folder, watch = given.inputs or Path(scratch), Stopwatch()
        if given.inputs is None:
            write_inputs(case, folder, total)
        trainer = build(case, folder, total, given.mode, {"output_dir": scratch, **more})
        trainer.add_callback(watch)
        trainer.train()
        before = load_file(folder / "student" / "model.safetensors")
        after = trainer.model.state_dict()
        moved = sum(not torch.equal(before[key], after[key]) for key in before)
    found = {
        "side": "trl", "case": case.name, "method": name, "settings": {"mode": given.mode, **more},
        "seconds": watch.seconds[given.warm_up :], "rollouts": case.rollouts,
        "tokens": [round(length * case.rollouts) for length in watch.lengths[given.warm_up :]], "moved": moved,
    }  # fmt: skip
    print(json.dumps({**found, **where}))
