"""Stop a run that learns nothing: updates that are not finite, steps that no reward could score."""

from __future__ import annotations

from distillkit.errors import TrainingStopped, problem
from distillkit.types import NOT_A_SCORE, StepOutput

__all__ = ["FruitlessSteps"]


class FruitlessSteps:
    """Counts fruitless steps in a row.

    Args:
        limit: so many dropped updates, or steps in which no rollout got a reward, are too many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.unscored = 0

    def count(self, output: StepOutput, step: int) -> None:
        """Count step `step` (from 1), the same on every rank.

        Raises:
            TrainingStopped: the limit is reached.
        """
        self.skipped = 0 if output.updates else self.skipped + output.skipped
        if self.skipped >= self.limit:
            where = f"step {step}: {self.skipped} updates in a row had a non-finite loss or gradient"
            hint = "a lower learning rate or model.beta; checkpoints/last.ckpt is from before or holds the same weights"
            raise TrainingStopped(problem(where, got="NaN or Inf", expected="finite numbers", hint=hint))
        scored = output.rewards is None or "train/reward" in output.metrics
        self.unscored = 0 if scored else self.unscored + 1
        if self.unscored >= self.limit:
            where = f"step {step}: no rollout of {self.unscored} steps in a row could be scored"
            hint = "model.rewards: the warnings above say why, such as a server that is down or a deadline too short"
            raise TrainingStopped(problem(where, got=_reasons(output), expected="rewards", hint=hint))


def _reasons(output: StepOutput) -> str:
    """The counts `train/<status>/<name>` of what was not scored."""
    statuses = tuple(f"train/{status}/" for status in ("not_applicable", *sorted(NOT_A_SCORE)))
    counts = {name: n for name, n in output.metrics.items() if name.startswith(statuses) and n}
    return ", ".join(f"{name.removeprefix('train/')} {n:.0f}" for name, n in counts.items()) or "no reward"
