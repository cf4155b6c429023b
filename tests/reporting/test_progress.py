"""The progress bar in real Lightning runs: manual optimization, endless data, with and without a terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from distillkit.errors import ConfigError
from distillkit.reporting.progress import StepProgress


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1


class Steps(LightningModule):
    """One training step is one rollout step of two updates, as in on-policy training."""

    def __init__(self, *, fail_at: int | None = None, talk: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at, self.talk = fail_at, talk
        self.rollout_step = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.rollout_step == self.fail_at:
            raise RuntimeError("the sampler broke")
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.layer(torch.ones(1, 1)).sum())
            optimizer.step()
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self.rollout_step += 1
        if self.talk:
            self.print("[bold]said", self.rollout_step)
        values = {"train/reward": self.rollout_step / 8, "train/divergence": 0.125, "train/completion_length": 33.25}
        self.log_dict({**values, "tokens_per_second/step": 2310.0, "train/truncated": 0.0}, batch_size=1)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/held_out/pass@1": 0.25, "val/aime/pass@1": 0.0, "val/held_out/maj@8": 0.5})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/accuracy", 1.0, batch_size=1)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return batch_idx

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path: Path, progress: StepProgress, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[progress],
        **settings,
    )


def endless() -> DataLoader[int]:
    return DataLoader(Endless(), batch_size=1)


pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*treespec.*"),
]

ROUND = {"val_check_interval": 4, "limit_val_batches": 2, "num_sanity_val_steps": 1}


def seconds_hidden(text: str) -> list[str]:
    return re.sub(r"\d+ s (elapsed|left)", r"N s \1", text).splitlines()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = trainer(tmp_path, StepProgress(every_n_steps=3), max_steps=8, max_epochs=-1, **ROUND)
    runner.fit(Steps(), endless(), DataLoader([1, 2, 3]))
    rates = "divergence 0.125  length 33.2  2,310 tok/s  N s elapsed"
    assert seconds_hidden(capsys.readouterr().out) == [
        f"step 1/8  reward 0.125  {rates}  N s left",
        f"step 3/8  reward 0.375  {rates}  N s left",
        "step 4/8  validation  held_out/pass@1 0.250  aime/pass@1 0.000",
        f"step 6/8  reward 0.750  {rates}  N s left",
        f"step 8/8  reward 1.000  {rates}",
        "step 8/8  validation  held_out/pass@1 0.250  aime/pass@1 0.000",
    ]


def test_plain_lines_of_a_resumed_run_that_is_stopped_early_go_on_from_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stops(Steps):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.rollout_step == 8

    module = Stops()
    module.rollout_step = 5
    runner = trainer(tmp_path, StepProgress(every_n_steps=100), max_steps=-1, max_epochs=-1)
    runner.fit(module, endless())
    lines = seconds_hidden(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in lines] == ["step 6", "step 8"]
    assert not any("left" in line for line in lines)


def test_a_module_that_does_not_count_is_counted_by_its_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Plain(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(torch.ones(1, 1)).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.layer = torch.nn.Linear(1, 1)
            return torch.optim.SGD(self.layer.parameters(), lr=0.0)

    trainer(tmp_path, StepProgress(every_n_steps=2), max_epochs=2).fit(Plain(), DataLoader([1, 2, 3]))
    lines = seconds_hidden(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in lines] == ["step 1/6", "step 2/6", "step 4/6", "step 6/6"]


class Screen:
    """What a terminal of 100 columns would show of the output, line by line, as it changes."""

    def __init__(self, text: str) -> None:
        frames = re.split(r"\x1b\[2K|\x1b\[1A|\r", text)
        self.lines = [re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", line).rstrip() for f in frames for line in f.splitlines()]

    def like(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return out


def test_a_bar_in_a_terminal(tmp_path: Path, terminal: io.StringIO) -> None:
    runner = trainer(tmp_path, StepProgress(), max_steps=8, max_epochs=-1, **ROUND)
    with redirect_stdout(terminal):
        runner.fit(Steps(talk=True), endless(), [DataLoader([1, 2, 3]), DataLoader([1])])
    text = terminal.getvalue()
    screen = Screen(text)
    assert "\x1b[?25l" in text and text.rstrip().endswith("\x1b[?25h"), "the cursor is hidden and given back"
    last = screen.like(r"^step ")[-1]
    assert re.fullmatch(
        r"step ━+ 8/8 0?0:00 reward 1.000 divergence 0.125 length 33.2 2,310 tok/s", last.replace("0:00:00", "0:00")
    ), last
    assert len(last) <= 80
    assert screen.like("^step 4/8  validation  held_out/pass@1 0.250  aime/pass@1 0.000$")
    assert screen.like("^step 8/8  validation  held_out/pass@1 0.250  aime/pass@1 0.000$")
    assert [line for line in screen.lines if line.startswith("[bold]said")] == [f"[bold]said {n}" for n in range(1, 9)]
    assert not screen.like("^step 0/8  validation"), "the sanity check reports nothing"


def test_validation_has_a_bar_of_its_own_while_it_lasts(tmp_path: Path, terminal: io.StringIO) -> None:
    class Watched(Steps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert progress._progress is not None
            progress._progress.refresh()

    progress = StepProgress()
    runner = trainer(tmp_path, progress, max_steps=4, max_epochs=-1, val_check_interval=4, num_sanity_val_steps=1)
    with redirect_stdout(terminal):
        runner.fit(Watched(), endless(), [DataLoader([1, 2, 3]), DataLoader([1])])
    screen = Screen(terminal.getvalue())
    assert screen.like(r"^check .* 0/1") and screen.like(r"^val .* 1/3") and screen.like(r"^val .* 0/1")
    assert re.search(r"^step .* 4/4", [line for line in screen.lines if line][-1]), "the bar of validation is gone"


def test_test_and_predict_have_bars_and_endless_training_a_pulse(tmp_path: Path, terminal: io.StringIO) -> None:
    class Watched(Steps):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.trainer.should_stop = self.rollout_step == 3

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.refresh()

        def predict_step(self, batch: Any, batch_idx: int) -> int:
            self.refresh()
            return 0

        def refresh(self) -> None:
            assert progress._progress is not None
            progress._progress.refresh()

    progress = StepProgress()
    runner = trainer(tmp_path, progress, max_steps=-1, max_epochs=-1)
    with redirect_stdout(terminal):
        runner.fit(Watched(), endless())
    assert Screen(terminal.getvalue()).like(r"^step .* 3/\? ")
    for run, name in ((runner.test, "test"), (runner.predict, "predict")):
        terminal.truncate(0)
        with redirect_stdout(terminal):
            run(Watched(), DataLoader([1, 2]))
        assert Screen(terminal.getvalue()).like(rf"^{name} .* 1/2")
        assert progress._progress is None


def test_the_terminal_is_given_back_when_a_step_fails(tmp_path: Path, terminal: io.StringIO) -> None:
    progress = StepProgress()
    with redirect_stdout(terminal):
        with pytest.raises(RuntimeError, match="the sampler broke"):
            trainer(tmp_path, progress, max_steps=8, max_epochs=-1).fit(Steps(fail_at=2), endless())
        assert sys.stdout is terminal
    assert progress._progress is None
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")


@pytest.mark.parametrize("plain", [True, False])
def test_other_ranks_show_nothing(
    tmp_path: Path, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    runner = trainer(tmp_path, StepProgress(plain=plain), max_steps=8, max_epochs=-1, **ROUND)
    with redirect_stdout(terminal):
        runner.fit(Steps(talk=True), endless(), DataLoader([1]))
    assert terminal.getvalue() == ""


def test_plain_can_be_asked_for_in_a_terminal(tmp_path: Path, terminal: io.StringIO) -> None:
    with redirect_stdout(terminal):
        trainer(tmp_path, StepProgress(plain=True), max_steps=2, max_epochs=-1).fit(Steps(), endless())
    assert "\x1b" not in terminal.getvalue() and terminal.getvalue().count("\n") == 2


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        StepProgress(every_n_steps=0)
    assert str(caught.value) == "StepProgress.every_n_steps\n    got:      0\n    expected: at least 1"
