"""Train on one or two processes and save the parameters: `python -m tests.training.ranks DEVICES CASE FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from distillkit import GRPO, K2, DataSource, LocalTeacher, OnPolicyDistillation, PromptData, ResponseLevel, make_trainer
from distillkit.components import RewardFn
from distillkit.types import RewardOutput, RolloutBatch
from tests import toy


class Informative(RewardFn):
    """Even first digits are right; a row marked `flat` is always right, so that nothing is left to learn from it."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        right = [
            row["kind"] == "flat" or text[0] in "02468" for row, text in zip(rollouts.rows, rollouts.texts, strict=True)
        ]
        return RewardOutput.single("informative", [float(r) for r in right], correct=right)


def main(devices: int, case: str, folder: Path) -> None:
    kinds = {"even": ["live"] * 4, "idle-rank": ["live", "live", "flat", "flat"], "all-idle": ["flat"] * 4}[case]
    models = folder / "models"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not models.exists():
        for name, seed in (("student", 0), ("teacher", 1)):
            toy.model(seed).save_pretrained(models / name)
            toy.tokenizer().save_pretrained(models / name)
        rows = [{"prompt": f"{i}+{i}=", "answer": "0", "kind": kind} for i, kind in enumerate(kinds)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pl.seed_everything(1)
    module = OnPolicyDistillation(
        student=str(models / "student"),
        sampler=toy.RandomSampler(group_size=4, max_new_tokens=8),
        rewards=[Informative()],
        teacher=LocalTeacher(path=str(models / "teacher")),
        divergence=K2(),
        beta=0.3,
        masker=ResponseLevel(),
        objective=GRPO(),
        tokens_per_micro_batch=40,
        max_grad_norm=0.5,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    )
    data = PromptData(train=DataSource(path=str(folder / "rows.jsonl")), prompts_per_step=4, shuffle=False)
    trainer = make_trainer(
        folder / f"run-{devices}",
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=3,
        checkpoint_every=100, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        torch.save(module.scorer.state_dict(), folder / f"{case}-{devices}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
