"""The data module under Lightning: what it serves, when it refuses, where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer, seed_everything
from transformers import PreTrainedTokenizerFast

from distillkit.data import DataSource, EvalBatch, EvalSet, PromptBatch, PromptData
from distillkit.errors import ConfigError, DataError

Jsonl = Callable[..., str]


class Recorder(LightningModule):
    """Trains nothing; keeps the cursor of what it trained, as a real module does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[int] = []
        self.validated: list[tuple[int, str, tuple[int, ...]]] = []
        self.cursor = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.trained += [prompt.index for prompt in batch.prompts]
        self.cursor = batch.next_cursor
        optimizer = self.optimizers()
        self.manual_backward((self.weight * 1.0).sum())
        optimizer.step()  # type: ignore[union-attr]

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append((dataloader_idx, batch.eval_set.name, batch.problem_indices))

    test_step = validation_step

    def predict_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> int:
        return len(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cursor"] = self.cursor

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trainer.datamodule.start_cursor = checkpoint["cursor"]  # type: ignore[attr-defined]


def trainer(folder: Path, steps: int, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **settings},
    )


@pytest.fixture
def source(jsonl: Jsonl) -> DataSource:
    return DataSource(path=jsonl([{"prompt": f"{n}+{n}?", "answer": str(2 * n)} for n in range(7)]))


@pytest.mark.filterwarnings("error", "ignore:.*LeafSpec:FutureWarning")
def test_fit_serves_the_stream_and_every_evaluation_set_without_a_warning(
    source: DataSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sets = [EvalSet(name="all", source=source, problems_per_batch=4), EvalSet(name="some", source=source)]
    data = PromptData(train=source, val=sets, prompts_per_step=3, seed=1)
    module = Recorder(tokenizer)
    trainer(tmp_path, 4, val_check_interval=2, check_val_every_n_epoch=None).fit(module, data)
    whole = [
        prompt.index for batch, _ in zip(data.train_dataloader(), range(4), strict=False) for prompt in batch.prompts
    ]
    assert module.trained == whole and len(whole) == 12
    once = [(0, "all", (0, 1, 2, 3)), (0, "all", (4, 5, 6)), (1, "some", (0, 1, 2, 3, 4, 5, 6))]
    assert module.validated == once * 2
    trainer(tmp_path, 1).fit(module, PromptData(train=source, prompts_per_step=3))


def test_validate_test_and_predict_need_no_training_data(
    source: DataSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = PromptData(val=[EvalSet(name="all", source=source)])
    module = Recorder(tokenizer)
    trainer(tmp_path, 1).validate(module, data, verbose=False)
    trainer(tmp_path, 1).test(module, data, verbose=False)
    assert module.validated == [(0, "all", (0, 1, 2, 3, 4, 5, 6))] * 2
    assert trainer(tmp_path, 1).predict(module, data) == [7]


@pytest.mark.parametrize("trained", [1, 2, 5, 7])
def test_a_resumed_run_goes_on_where_training_was_not_where_fetching_was(
    trained: int, source: DataSource, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def run(steps: int, checkpoint: Path | None) -> Recorder:
        module = Recorder(tokenizer)
        this = trainer(tmp_path, steps)
        this.fit(module, PromptData(train=source, prompts_per_step=3, seed=1), ckpt_path=checkpoint)
        this.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole = run(10, None).trained
    first = run(trained, None).trained
    second = run(10, tmp_path / f"{trained}.ckpt").trained
    assert first + second == whole


def test_the_seed_of_the_run_orders_the_prompts_unless_given(
    source: DataSource, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(run_seed: int, seed: int | None) -> list[int]:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        seed_everything(run_seed, verbose=False)
        data = PromptData(train=source, prompts_per_step=7, seed=seed)
        data.prepare(tokenizer)
        return [prompt.index for prompt in next(iter(data.train_dataloader())).prompts]

    assert order(1, None) == order(1, None) == order(2, 1)
    assert order(1, None) != order(2, None)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def test_reports_name_each_source(source: DataSource, tokenizer: PreTrainedTokenizerFast) -> None:
    sets = [EvalSet(name="first", source=source)]
    data = PromptData(train=source, val=sets, max_prompt_tokens=5)
    data.prepare(tokenizer)
    assert [(report.name, report.kept) for report in data.reports] == [("data.train", 7), ("data.val.first", 7)]


def test_a_supervised_module_gets_completions(jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    class Supervised(Recorder):
        needs_completions = True

        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.trained = [len(prompt.completion_ids or ()) for prompt in batch.prompts]

    source = DataSource(path=jsonl([{"prompt": "2+3?", "completion": "5"}]))
    module = Supervised(tokenizer)
    trainer(tmp_path, 1).fit(module, PromptData(train=source, prompts_per_step=1))
    assert module.trained == [2]


def test_changed_training_data_is_refused_on_resume(
    jsonl: Jsonl, source: DataSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    def prepared(**settings: Any) -> PromptData:
        data = PromptData(train=source, val=[EvalSet(name="all", source=source)], **settings)
        data.prepare(tokenizer)
        return data

    saved = prepared().fingerprint()
    assert prepared().check_fingerprint(saved) == ()
    jsonl([{"prompt": f"{n}+{n}?", "answer": str(2 * n)} for n in range(6)])
    with pytest.raises(DataError) as caught:
        prepared().check_fingerprint(saved)
    assert str(caught.value) == (
        "data.train: not the data of the resumed run\n"
        f"    got:      {source.path}: 6 prompts, its rows changed\n"
        f"    expected: {source.path}: 7 prompts, content {saved['data.train']['content'][:12]}\n"
        "    try:      restore the data, or start a new run from the exported student"
    )
    saved["data.train"] = prepared().fingerprint()["data.train"]
    assert prepared().check_fingerprint(saved) == ("data.val.all",)


def test_bad_data_is_reported_before_the_tokenizer_is_asked_for(tmp_path: Path) -> None:
    class NoTokenizer(Recorder):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        @property
        def tokenizer(self) -> Any:  # type: ignore[override]
            raise AssertionError("asked for the tokenizer")

    with pytest.raises(DataError, match="no such file"):
        trainer(tmp_path, 1).fit(NoTokenizer(), PromptData(train=DataSource(path="none.jsonl")))


def test_settings_that_cannot_work(source: DataSource, tokenizer: PreTrainedTokenizerFast) -> None:
    twice = [EvalSet(name="a", source=source), EvalSet(name="a", source=source)]
    for build, message in (
        (lambda: PromptData(prompts_per_step=0), "data.prompts_per_step\n    got:      0\n    expected: at least 1"),
        (lambda: PromptData(max_prompt_tokens=0), "data.max_prompt_tokens\n    got:      0\n    expected: at least 1"),
        (
            lambda: PromptData(val=twice),
            "data.val: a name is used twice\n    got:      a\n    expected: one name per evaluation set",
        ),
        (
            lambda: PromptData(train=DataSource(path="x.jsonl", limit=0)),
            "data.train.limit\n    got:      0\n    expected: at least 1, or null for all rows",
        ),
        (
            lambda: PromptData().prepare(tokenizer),
            "data.train: nothing to train on\n    got:      null\n    expected: a source\n"
            "    try:      data.train: {path: prompts.jsonl}",
        ),
        (
            lambda: PromptData(train=source).prepare(tokenizer, "test"),
            "data.val: test has no evaluation set\n    got:      none\n"
            "    try:      data.val: [{name: test, source: {path: test.jsonl}}]",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            build()
        assert str(caught.value) == message


def test_yaml_and_command_line_build_the_module(source: DataSource, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PromptData, "data")
    parser.add_argument("--config", action="config")
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n"
        "  train:\n"
        "    path: [a.jsonl, b.jsonl]\n"
        "    columns: {prompt: question}\n"
        '    template: "{question}\\n"\n'
        "    chat_template_kwargs: {enable_thinking: false}\n"
        "  val:\n"
        "    - name: test\n"
        "      source: {path: c.jsonl, limit: 5}\n"
        "      k: 4\n"
        "      temperature: 0.6\n"
        "  prompts_per_step: 8\n"
    )
    parsed = parser.parse_args(["--config", str(config), "--data.train.path=d.jsonl", "--data.train.limit=3"])
    data = (
        parser.instantiate(parsed).data if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed).data
    )
    assert data.train == DataSource(
        path="d.jsonl",
        columns={"prompt": "question"},
        template="{question}\n",
        chat_template_kwargs={"enable_thinking": False},
        limit=3,
    )
    assert data.val == (EvalSet(name="test", source=DataSource(path="c.jsonl", limit=5), k=4, temperature=0.6),)
    assert data.prompts_per_step == 8
    with pytest.raises(FrozenInstanceError):
        data.train.limit = 4
