"""How a run begins and ends: what it notes at the start, and a validation of its last step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from transformers import GPT2Config, Qwen3Config

from distillkit import DataSource, ForwardKL, LocalTeacher, OnPolicyDistillation, PromptData, SupervisedModule, Switch
from distillkit.data import EvalSet
from distillkit.runs import make_trainer
from distillkit.training.budget import TokenBudget
from distillkit.training.positions import beyond_positions
from tests import toy


class Events(Callback):
    """The steps that are validated and those that are saved, in their order."""

    def __init__(self, break_at: int | None = None) -> None:
        self.seen: list[tuple[str, int]] = []
        self.break_at = break_at

    @property
    def validated(self) -> list[int]:
        return [step for what, step in self.seen if what == "validated"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.rollout_step == self.break_at:
            raise RuntimeError("broken")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen.append(("validated", pl_module.rollout_step))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.seen.append(("saved", pl_module.rollout_step))


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("student", 0), ("teacher", 1)):
        toy.model(seed).save_pretrained(name)
        toy.tokenizer().save_pretrained(name)
    rows = [{"prompt": f"{i}+{i}=", "completion": "1" * (1 + i % 4)} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sampler() -> toy.RandomSampler:
    return toy.RandomSampler(group_size=2, max_new_tokens=8)


def on_policy(**more: Any) -> OnPolicyDistillation:
    teacher = LocalTeacher(path="./teacher")
    settings = {"teacher": teacher, "divergence": ForwardKL(), "beta": 1.0, **more}
    return OnPolicyDistillation(student="./student", sampler=sampler(), **settings)


def supervised() -> SupervisedModule:
    return SupervisedModule(student="./student", sampler=sampler())


def fit(
    folder: str,
    *,
    steps: int,
    module: Any = None,
    events: Events | None = None,
    callbacks: tuple[Callback, ...] = (),
    ckpt: str | None = None,
    data: dict[str, Any] | None = None,
    **more: Any,
) -> list[tuple[str, int]]:
    pl.seed_everything(1)
    events = events or Events()
    settings = {"val_check_interval": 3, "checkpoint_every": 2, "enable_progress_bar": False, **more}
    trainer = make_trainer(
        folder, max_steps=steps, accelerator="cpu", devices=1, callbacks=[events, *callbacks], **settings
    )
    source = DataSource(path="rows.jsonl")
    val = [EvalSet(name="val", source=source)]
    prompts = PromptData(**{"train": source, "val": val, "prompts_per_step": 4, **(data or {})})
    trainer.fit(module or on_policy(), datamodule=prompts, ckpt_path=ckpt, weights_only=True)
    return events.seen


@pytest.mark.parametrize("kind", [on_policy, supervised])
def test_the_last_step_is_validated_and_saved_after_that(kind: Any) -> None:
    events = [("validated", 0), ("saved", 2), ("validated", 3), ("validated", 4), ("saved", 4)]
    assert fit("run", steps=4, module=kind()) == events


def test_a_last_step_is_validated_once() -> None:
    assert fit("run", steps=3) == [("validated", 0), ("saved", 2), ("validated", 3), ("saved", 3)]


def test_without_an_interval_the_start_and_the_end_are_validated() -> None:
    events = Events()
    fit("run", steps=2, events=events, val_check_interval=None)
    assert events.validated == [0, 2]


def test_a_budget_ends_a_run_in_the_same_way() -> None:
    events = Events()
    fit("run", steps=50, events=events, callbacks=(TokenBudget(completion_tokens=130),))
    last = int(Path("run/metrics.csv").read_text().splitlines()[-1].split(",")[0])
    assert last % 3 and last < 50
    assert events.validated == [*range(0, last, 3), last]
    assert ("saved", last) in events.seen


@pytest.mark.parametrize("off", [{"limit_val_batches": 0}, {"data": {"val": []}}])
def test_no_validation_stays_none(off: dict[str, Any]) -> None:
    assert fit("run", steps=4, **off) == [("saved", 2), ("saved", 4)]


def test_a_run_that_breaks_in_its_last_step_is_not_validated() -> None:
    events = Events(break_at=4)
    with pytest.raises(RuntimeError, match="broken"):
        fit("run", steps=4, events=events)
    assert events.validated == [0, 3]


def test_a_continued_run_validates_what_is_new() -> None:
    fit("first", steps=4)
    assert fit("again", steps=4, ckpt="first/checkpoints/last.ckpt") == []
    events = Events()
    fit("on", steps=7, events=events, ckpt="first/checkpoints/last.ckpt")
    assert events.validated == [6, 7]


def test_a_schedule_that_ends_after_the_run_is_named_before_the_models_are_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(self: OnPolicyDistillation) -> None:
        raise RuntimeError("loads")

    monkeypatch.setattr(OnPolicyDistillation, "load_student", no_model)
    module = on_policy(beta=Switch(before=1.0, after=0.0, at=40))
    with pytest.raises(RuntimeError, match="loads"):
        fit("run", steps=2, module=module)
    said = "Note: model.beta: Switch needs 41 steps to end, and trainer.max_steps is 2: the run ends first\n"
    assert capsys.readouterr().out.count(said) == 1


def test_sequences_beyond_the_students_positions_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    fit("run", steps=1, data={"max_prompt_tokens": 121})
    said = capsys.readouterr().out
    assert said.count("Note: ") == 1
    assert (
        "Note: model.sampler.max_new_tokens: prompts of up to 121 tokens and 8 new ones are 129, beyond the 128 "
        "positions that the student declares (max_position_embeddings); what it writes there may be poor\n"
    ) in said
    fit("fits", steps=1, data={"max_prompt_tokens": 120})
    source = DataSource(path="rows.jsonl")
    fit("val", steps=1, data={"val": [EvalSet(name="long", source=source, max_new_tokens=126)]})
    said = capsys.readouterr().out
    assert said.count("Note: ") == 1
    assert "Note: data.val.long.max_new_tokens: prompts of up to 4 tokens and 126 new ones are 130" in said


def test_what_a_model_declares() -> None:
    asked = {"a": (10, 20), "b": (10, 91)}

    def notes(config: Any) -> list[str]:
        return [line.partition(":")[0] for line in beyond_positions(config, asked)]

    assert notes(Qwen3Config(max_position_embeddings=100)) == ["b"]
    assert notes(Qwen3Config(max_position_embeddings=101)) == []
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e6}
    assert notes(Qwen3Config(max_position_embeddings=100, rope_parameters=yarn)) == []
    assert notes(GPT2Config(n_positions=16)) == [], "the sampler refuses what its table does not hold"
    assert beyond_positions(SimpleNamespace(get_text_config=lambda: object()), asked) == []
    assert beyond_positions(Qwen3Config(max_position_embeddings=8), {}) == []
