"""Train some cases under one strategy and save what came of them: `python -m tests.training.ranks STRATEGY FOLDER`.

Several ranks: the same under `python -m torch.distributed.run --nproc-per-node 2`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distillkit import GRPO, K2, DataSource, LocalTeacher, OnPolicyDistillation, PromptData, ResponseLevel, make_trainer
from distillkit.components import RewardFn
from distillkit.divergences.full import ReverseKL
from distillkit.lora import LoraSettings
from distillkit.teachers.adapter_off import AdapterOffTeacher
from distillkit.training.strategies.single import LightningBackend
from distillkit.training.strategies.zero import ZeroBackend
from distillkit.types import RewardOutput, RolloutBatch, ScoreRequest, TeacherScores
from tests import toy


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training; `kinds` are the rows, 4 a step, the first two of which go to rank 0 of 2."""

    kinds: Sequence[str] = ("live",) * 4
    tokens_per_micro_batch: int = 40
    max_grad_norm: float | None = 0.5
    max_steps: int = 1
    tied: bool = True
    updates: int = 1
    gradient_checkpointing: bool = False
    head_chunk: int | None = None
    lora: LoraSettings | None = None


CASES = {
    "one-micro-batch": Case(tokens_per_micro_batch=10_000, max_grad_norm=None),
    "several-micro-batches": Case(max_grad_norm=None),
    "clipped": Case(),
    "untied": Case(tied=False, gradient_checkpointing=True, head_chunk=3),
    "lora": Case(lora=LoraSettings(rank=4, target_modules=["q_proj", "down_proj"]), max_steps=2),
    "lora-head": Case(lora=LoraSettings(rank=4, target_modules=["v_proj", "lm_head"]), tied=False, updates=2),
    "several-updates": Case(updates=2, max_steps=2),
    "idle-rank": Case(kinds=("live", "live", "flat", "flat"), max_steps=3),
    "all-idle": Case(kinds=("flat",) * 4, max_steps=2),
    "infinite-loss": Case(kinds=("live", "live", "live", "broken", *("live",) * 4), max_steps=3),
}
"""`idle-rank` gives ranks unequal work; `infinite-loss` spoils the first update, on one rank only."""


class Informative(RewardFn):
    """Even first digits are right; a row marked `flat` is always right, so that nothing is left to learn from it."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        kinds = [row["kind"] for row in rollouts.rows]
        right = [kind == "flat" or text[0] in "02468" for kind, text in zip(kinds, rollouts.texts, strict=True)]
        return RewardOutput.single("informative", [float(r) for r in right], correct=right)


class Overflowing(LocalTeacher):
    """A teacher with infinite log-probs for rows marked `broken`."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        broken = torch.tensor([row["kind"] == "broken" for row in rollouts.rows])
        return replace(scores, sampled=scores.sampled.masked_fill(broken[:, None], float("-inf")))


def gradients(backend: LightningBackend) -> dict[str, Tensor]:
    """The whole gradient of every parameter, before the optimizer; every rank has to ask."""
    found: dict[str, Tensor] = {}
    for name, parameter in backend.scorer.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(backend, ZeroBackend):
            from deepspeed.utils import safe_get_full_grad

            gradient: Any = safe_get_full_grad(parameter)
        else:
            gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = torch.zeros(parameter.shape) if gradient is None else gradient.detach().clone()
    return found


def record_first_gradient(first: list[dict[str, Tensor]]) -> None:
    """Let `first` take the gradient of a run's first update, as it is before clipping."""
    for kind in (ZeroBackend, LightningBackend):
        clip = kind.clip_and_norm

        def recorded(self: Any, max_norm: float | None, clip: Any = clip) -> Tensor:
            if not first:
                first.append(gradients(self))
            norm: Tensor = clip(self, max_norm)
            return norm

        kind.clip_and_norm = recorded  # type: ignore[method-assign]


def write_inputs(folder: Path, case: Case) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        toy.model(seed, tied=case.tied).save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{i}+{i}=", "answer": "0", "kind": kind} for i, kind in enumerate(case.kinds)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(strategy: str, folder: Path, case: Case, first: list[dict[str, Tensor]]) -> None:
    pl.seed_everything(1)
    module = OnPolicyDistillation(
        student=str(folder / "student"),
        sampler=toy.RandomSampler(group_size=4, max_new_tokens=8),
        rewards=[Informative()],
        teacher=Overflowing(path=str(folder / "teacher")),
        divergence=K2(),
        beta=0.3,
        reference=None if case.lora is None else AdapterOffTeacher(),
        reference_divergence=None if case.lora is None else ReverseKL(),
        reference_beta=None if case.lora is None else 0.2,
        lora=case.lora,
        masker=ResponseLevel(),
        objective=GRPO(),
        minibatches=case.updates,
        tokens_per_micro_batch=case.tokens_per_micro_batch,
        head_chunk=case.head_chunk,
        max_grad_norm=case.max_grad_norm,
        gradient_checkpointing=case.gradient_checkpointing,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    )
    data = PromptData(train=DataSource(path=str(folder / "rows.jsonl")), prompts_per_step=4, shuffle=False)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make_trainer(
        folder / "run",
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=case.max_steps, checkpoint_every=100,
        enable_progress_bar=False,
    )  # fmt: skip
    first.clear()
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        torch.save(first[0], folder / "gradient.pt")


def main(strategy: str, folder: Path) -> None:
    first: list[dict[str, Tensor]] = []
    record_first_gradient(first)
    if int(os.environ.get("RANK", 0)) == 0:
        for name, case in CASES.items():
            (folder / name).mkdir(parents=True)
            write_inputs(folder / name, case)
        (folder / "written").touch()
    while not (folder / "written").exists():
        time.sleep(0.1)
    for name, case in CASES.items():
        train(strategy, folder / name, case, first)


def note_end(folder: Path) -> None:
    """Leave a file if the process group is gone."""
    if not torch.distributed.is_initialized():
        (folder / f"ended-{os.environ.get('RANK', 0)}").touch()


if __name__ == "__main__":
    atexit.register(note_end, Path(sys.argv[2]))  # runs after what is registered later
    main(sys.argv[1], Path(sys.argv[2]))
