"""TRL's DistillationTrainer (exact reverse KL) on a case, in TRL's own environment.

PYTHONPATH=benchmarks python benchmarks/peers/trl_distillation.py --case fixed [--mode default]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import DistillationConfig, DistillationTrainer
from trl_shared import Case, rows, run, settings


def build(case: Case, folder: Path, steps: int, mode: str, more: dict[str, Any]) -> DistillationTrainer:
    """Return the trainer."""
    config = DistillationConfig(**settings(case, steps, mode, more), beta=1.0)
    return DistillationTrainer(
        model=str(folder / "student"), teacher_model=str(folder / "teacher"), args=config,
        train_dataset=rows(case, steps, copies=case.group_size),
    )  # fmt: skip


if __name__ == "__main__":
    run("distil", build)
