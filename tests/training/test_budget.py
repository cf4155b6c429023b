"""A token budget ends a run as its last step would, and survives a resume."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from distillkit import DataSource, ForwardKL, LocalTeacher, OnPolicyDistillation, PromptData, SupervisedModule
from distillkit.cli.main import main
from distillkit.errors import ConfigError
from distillkit.runs import make_trainer
from distillkit.training.budget import TokenBudget
from distillkit.training.checkpoints import LastCheckpoint
from tests import toy

ROOT = Path(__file__).parents[2]


class Tokens(Callback):
    """What each step trained on, counted on its own."""

    def __init__(self) -> None:
        self.of_step: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.of_step.append(int(pl_module.last_output.rollouts.completion_lengths.sum()))


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("student", 0), ("teacher", 1)):
        toy.model(seed).save_pretrained(name)
        toy.tokenizer().save_pretrained(name)
    rows = [{"prompt": f"{i}+{i}=", "completion": "1" * (1 + i % 4)} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def on_policy() -> OnPolicyDistillation:
    return OnPolicyDistillation(
        student="./student",
        sampler=toy.RandomSampler(group_size=2, max_new_tokens=8),
        teacher=LocalTeacher(path="./teacher"),
        divergence=ForwardKL(),
        beta=1.0,
    )


def supervised() -> SupervisedModule:
    return SupervisedModule(student="./student")


def fit(
    folder: str, budget: TokenBudget, *, steps: int = 50, module: Any = None, ckpt: str | None = None, **more: Any
) -> list[int]:
    pl.seed_everything(1)
    tokens = Tokens()
    arguments = {"checkpoint_every": 1, "callbacks": [budget, tokens], **more}
    trainer = make_trainer(
        folder, max_steps=steps, accelerator="cpu", enable_progress_bar=False, devices=1, **arguments
    )
    data = PromptData(train=DataSource(path="rows.jsonl"), prompts_per_step=4)
    trainer.fit(module or on_policy(), datamodule=data, ckpt_path=ckpt, weights_only=True)
    return tokens.of_step


def logged(folder: str) -> list[str]:
    with open(f"{folder}/metrics.csv") as stream:
        return [row["train/completion_tokens"] for row in csv.DictReader(stream)]


def saved(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def sums(values: list[int]) -> list[int]:
    return [sum(values[: i + 1]) for i in range(len(values))]


@pytest.mark.parametrize("kind", [on_policy, supervised])
def test_the_run_ends_after_the_step_that_reaches_the_budget(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    budget = TokenBudget(completion_tokens=60)
    seen = sums(fit("run", budget, module=kind()))
    assert seen[-2] < 60 <= seen[-1]
    assert budget.tokens == seen[-1]
    assert logged("run") == [str(total) for total in seen]
    assert saved("run/checkpoints/last.ckpt")["distillkit"]["rollout_step"] == len(seen)
    assert Path("run/student/model.safetensors").is_file()
    assert f"Token budget reached: {seen[-1]} of 60 completion tokens after step {len(seen)}" in capsys.readouterr().out


def test_the_budget_is_reached_to_the_token() -> None:
    first, second = fit("measured", TokenBudget(completion_tokens=10**9), steps=2)
    assert len(fit("exact", TokenBudget(completion_tokens=first))) == 1
    assert len(fit("one-more", TokenBudget(completion_tokens=first + 1))) == 2
    assert len(fit("both", TokenBudget(completion_tokens=first + second))) == 2


def test_max_steps_still_ends_a_run_that_is_within_its_budget() -> None:
    budget = TokenBudget(completion_tokens=10**9)
    seen = fit("run", budget, steps=3)
    assert len(seen) == 3
    assert budget.tokens == sum(seen)


def test_completions_of_given_rows_are_counted_with_their_end_tokens() -> None:
    budget = TokenBudget(completion_tokens=10**9)
    fit("run", budget, steps=2, module=supervised())
    assert budget.tokens == 2 * (2 + 3 + 4 + 5), "two steps of four rows are all eight rows"


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_continued_run_ends_at_the_step_of_an_unbroken_one(ours_first: bool) -> None:
    unbroken = fit("unbroken", TokenBudget(completion_tokens=120))
    assert len(unbroken) >= 4

    def broken(folder: str, steps: int, ckpt: str | None) -> tuple[list[int], TokenBudget]:
        budget, last = TokenBudget(completion_tokens=120), LastCheckpoint(every_n_steps=1, dirpath="saved")
        callbacks = [budget, last] if ours_first else [last, budget]
        tokens = Tokens()
        fit(folder, budget, steps=steps, ckpt=ckpt, checkpoint_every=1000, callbacks=[*callbacks, tokens])
        return tokens.of_step, budget

    before, _ = broken("first", 2, None)
    assert saved("saved/last.ckpt")["callbacks"]["TokenBudget"] == {"tokens": sum(before)}
    after, budget = broken("second", 50, "saved/last.ckpt")
    assert before + after == unbroken
    assert budget.tokens == sum(unbroken)
    assert logged("second") == [str(total) for total in sums(unbroken)[2:]]


def test_a_checkpoint_in_the_middle_holds_the_count_of_its_own_step() -> None:
    """Lightning may save between the step and our hook, whatever the order of the callbacks."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            trainer.save_checkpoint(f"at-{pl_module.rollout_step}.ckpt", weights_only=False)

    budget, tokens = TokenBudget(completion_tokens=10**9), Tokens()
    fit("run", budget, steps=3, callbacks=[Saves(), budget, tokens])
    counts = [saved(f"at-{step}.ckpt")["callbacks"]["TokenBudget"]["tokens"] for step in (1, 2, 3)]
    assert counts == sums(tokens.of_step)
    assert logged("run") == [str(count) for count in counts], "nothing is counted twice"


def test_a_run_that_used_its_budget_does_nothing_when_it_is_continued() -> None:
    fit("run", TokenBudget(completion_tokens=60))
    budget = TokenBudget(completion_tokens=60)
    assert fit("again", budget, ckpt="run/checkpoints/last.ckpt") == []
    assert budget.tokens >= 60
    assert Path("again/student/model.safetensors").is_file()


def test_a_second_fit_of_one_module_counts_from_its_own_start() -> None:
    module = on_policy()
    fit("first", TokenBudget(completion_tokens=10**9), steps=2, module=module)
    budget = TokenBudget(completion_tokens=10**9)
    seen = fit("second", budget, steps=2, module=module)
    assert budget.tokens == sum(seen)


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_budget_of_nothing_is_refused(tokens: int) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenBudget(completion_tokens=tokens)
    assert str(caught.value) == (
        f"trainer.callbacks, TokenBudget.completion_tokens\n    got:      {tokens}\n    expected: at least 1 token"
    )


def test_another_module_is_refused() -> None:
    class Other(pl.LightningModule):
        pass

    with pytest.raises(ConfigError) as caught:
        TokenBudget(completion_tokens=1).on_fit_start(pl.Trainer(accelerator="cpu", logger=False), Other())
    assert str(caught.value) == (
        "trainer.callbacks: TokenBudget counts the tokens of distillkit's steps\n"
        "    got:      Other\n"
        "    expected: OnPolicyDistillation or SupervisedModule"
    )


CONFIG = """\
trainer:
  callbacks:
    - class_path: distillkit.training.budget.TokenBudget
      init_args: {completion_tokens: 700}
  val_check_interval: 100
model: {teacher: null, divergence: null, sampler: {group_size: 4}}
data: {prompts_per_step: 4}
"""


@pytest.mark.slow
def test_a_budget_alone_ends_a_run_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("budget.yaml").write_text(CONFIG)
    words = [
        "fit",
        "--config",
        "quickstart",
        "--config",
        "budget.yaml",
        "--run_dir",
        "run",
        "--trainer.accelerator=cpu",
    ]
    assert main([*words, "--trainer.max_steps", "-1", "--data.val.0.source.limit", "20"]) == 0
    said = capsys.readouterr().out
    assert "Token budget reached: " in said and said.rstrip().splitlines()[-1].startswith("Done: ")
    with open("run/metrics.csv") as stream:
        rows = list(csv.DictReader(stream))
    totals = [int(row["train/completion_tokens"]) for row in rows[1:]]
    assert totals[-2] < 700 <= totals[-1]
    assert rows[-1]["val/held_out/pass@1"], "the last step is evaluated"
    assert json.loads(Path("run/status.json").read_text())["state"] == "finished"
    assert Path("run/student/model.safetensors").is_file()
    assert saved("run/checkpoints/last.ckpt")["distillkit"]["rollout_step"] == len(totals)


TWO_RANKS = """
import sys
from tests.training.test_budget import TokenBudget, on_policy, PromptData, DataSource, make_trainer, pl
if __name__ == "__main__":
    pl.seed_everything(1)
    budget = TokenBudget(completion_tokens=60)
    devices = int(sys.argv[1])
    trainer = make_trainer(f"ranks-{devices}", max_steps=50, accelerator="cpu", devices=devices, callbacks=[budget],
                           strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False, checkpoint_every=1)
    trainer.fit(on_policy(), datamodule=PromptData(train=DataSource(path="rows.jsonl"), prompts_per_step=4))
    print(f"rank {trainer.global_rank}: {budget.tokens} tokens in {trainer.global_step} steps", flush=True)
"""


@pytest.mark.slow
def test_two_ranks_spend_one_budget() -> None:
    Path("ranks.py").write_text(TWO_RANKS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for devices in ("1", "2"):
        command = [sys.executable, "ranks.py", devices]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(sorted(line for line in done.stdout.splitlines() if line.startswith("rank ")))
    (alone,), both = said
    assert [line.split(": ")[1] for line in both] == [alone.split(": ")[1]] * 2
