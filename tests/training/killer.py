"""Run the command line, and kill this process (SIGKILL) at the n-th call of one phase.

usage: python -m tests.training.killer PHASE N distillkit-arguments...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import distillkit.step
import distillkit.training.checkpoints
import distillkit.training.evaluating
from distillkit.cli.main import main
from distillkit.rewards.answer import AnswerReward
from distillkit.samplers.hf import HFSampler
from distillkit.teachers.local import LocalTeacher
from distillkit.training.strategies.single import LightningBackend

PLACES: dict[str, tuple[Any, str]] = {
    "rollout": (HFSampler, "sample"),
    "teacher": (LocalTeacher, "score"),
    "reward": (AnswerReward, "__call__"),
    "old_policy": (distillkit.step, "old_policy_scores"),
    "update": (LightningBackend, "backward"),
    "optimizer": (LightningBackend, "optimizer_step"),
    "validation": (distillkit.training.evaluating, "evaluate_batch"),
    "checkpoint": (distillkit.training.checkpoints.os, "replace"),
}


def kill_at(phase: str, call: int) -> None:
    owner, name = PLACES[phase]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if phase == "checkpoint" and not str(args[1]).endswith("last.ckpt"):
            return original(*args, **kwargs)
        calls += 1
        if calls == call:
            if phase == "rollout":
                next(iter(original(*args, **kwargs)))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    raise SystemExit(main(sys.argv[3:]))
