"""Run the command line, and end one rank at the n-th call of one phase.

usage: python -m tests.training.killer PHASE N [RANK [killed | raised | alone]] distillkit-arguments...

It is killed (SIGKILL), or raises; `alone`, it is killed while the others are busy there and wait for nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import distillkit.step
import distillkit.training.checkpoints
import distillkit.training.evaluating
from distillkit.cli.launch import global_rank
from distillkit.cli.main import main
from distillkit.rewards.answer import AnswerReward
from distillkit.samplers.hf import HFSampler
from distillkit.teachers.local import LocalTeacher
from distillkit.training.checkpoints import LastCheckpoint
from distillkit.training.strategies.single import LightningBackend

PLACES: dict[str, tuple[Any, str]] = {
    "rollout": (HFSampler, "sample"),
    "teacher": (LocalTeacher, "score"),
    "reward": (AnswerReward, "__call__"),
    "old_policy": (distillkit.step, "old_policy_scores"),
    "update": (LightningBackend, "backward"),
    "optimizer": (LightningBackend, "optimizer_step"),
    "validation": (distillkit.training.evaluating, "evaluate_batch"),
    "saving": (LastCheckpoint, "_save"),
    "checkpoint": (distillkit.training.checkpoints.os, "replace"),
}


def end_at(phase: str, call: int, rank: int = 0, how: str = "killed") -> None:
    owner, name = PLACES[phase]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if phase == "checkpoint" and not str(args[1]).endswith("last.ckpt"):
            return original(*args, **kwargs)
        calls += 1
        if calls == call and how == "alone" and global_rank() != rank:
            time.sleep(600)
        if calls == call and global_rank() == rank:
            if phase == "rollout":
                next(iter(original(*args, **kwargs)))
            if how == "raised":
                raise OSError(f"no space left in {phase}")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    place, arguments = sys.argv[1:3], sys.argv[3:]
    while arguments[0] not in ("fit", "validate", "test"):
        place.append(arguments.pop(0))
    end_at(place[0], int(place[1]), *map(int, place[2:3]), *place[3:])
    raise SystemExit(main(arguments))
