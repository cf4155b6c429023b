"""TRL's GRPOTrainer on a case, in TRL's own environment.

PYTHONPATH=benchmarks python benchmarks/peers/trl_grpo.py --case fixed [--mode default]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import reward
from trl import GRPOConfig, GRPOTrainer
from trl_shared import Case, rows, run, settings


def by_chance(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward of `cases.py`."""
    return [reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def build(case: Case, folder: Path, steps: int, mode: str, more: dict[str, Any]) -> GRPOTrainer:
    """Return the trainer."""
    config = GRPOConfig(**settings(case, steps, mode, more), num_generations=case.group_size)
    return GRPOTrainer(
        model=str(folder / "student"), reward_funcs=by_chance, args=config, train_dataset=rows(case, steps)
    )


if __name__ == "__main__":
    run("grpo", build)
