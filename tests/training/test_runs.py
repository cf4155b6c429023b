"""Whole short runs of the quickstart through the command line, as a Lightning user would vary them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import embedded
from distillkit.cli.main import main
from distillkit.components import RewardFn
from distillkit.divergences.sampled import K2
from distillkit.reporting.rollouts import read_rollouts
from distillkit.types import RewardOutput, RolloutBatch, TokenScores

pytestmark = pytest.mark.slow

SMALL = [
    "--config", "quickstart", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
    "--data.val.0.source.limit", "20", "--trainer.accelerator", "cpu", "--run_dir", "run",
]  # fmt: skip
CACHED = json.dumps({"name": "cached", "dir": "cache", "teacher": {"name": "local", "path": "embedded:teacher"}})
FIT = ["fit", *SMALL, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


class BreaksAtThird(K2):
    """k2, but NaN from the third step on; the backward pass calls it once more, with gradient."""

    calls = 0

    def __call__(self, student: TokenScores, teacher: TokenScores) -> torch.Tensor:
        type(self).calls += not torch.is_grad_enabled()
        value = super().__call__(student, teacher)
        return value * float("nan") if self.calls > 2 else value


class NeverScores(RewardFn):
    """A reward whose judge never answers."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        return RewardOutput.single("judge", [None] * len(rollouts), status=["undecided"] * len(rollouts))


def rows() -> list[dict[str, str]]:
    with open("run/metrics.csv") as stream:
        return list(csv.DictReader(stream))


def test_a_run_says_what_it_does_and_leaves_a_readable_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FIT) == 0
    said = capsys.readouterr().out
    sentence = (
        "Each step draws 4 prompts x 4 rollouts (up to 48 tokens, temperature 1) with hf, scores them with answer, "
        "lets the local teacher embedded:teacher score the same tokens, and minimises grpo (token mean) + 0.2 * "
        "k2(student, teacher) as a loss."
    )
    assert sentence in said
    assert "Rows: data.train (embedded:arithmetic/train) 40,960 kept, none dropped" in said
    assert "At most 768 sampled tokens per step" in said
    assert said.index(sentence) < said.index("2 rollouts of group")
    assert said.rstrip().splitlines()[-1].startswith("Done: val/held_out/pass@1 ")
    assert said.rstrip().splitlines()[-1].endswith("student in run/student, everything else in run")
    expected = {"recipe.yaml", "config.yaml", "environment.json", "metrics.csv", "rollouts", "eval", "plots"}
    assert expected | {"checkpoints", "student", "status.json"} <= {path.name for path in Path("run").iterdir()}
    assert [row["step"] for row in rows()] == ["0", "1", "2", "3", "4"]
    assert [bool(row["val/held_out/pass@1"]) for row in rows()] == [True, False, True, False, True]
    recorded = read_rollouts("run/rollouts/step-000001.jsonl")
    assert len(recorded) == 16
    assert all(d is not None for rollout in recorded for d in rollout.log_ratios)
    environment = json.loads(Path("run/environment.json").read_text())
    assert environment["models"]["teacher"].startswith("local:sha256:")
    assert {path.stem for path in Path("run/plots").glob("*.png")} >= {"reward", "divergence", "length", "accuracy"}
    answers = [json.loads(line) for line in Path("run/eval/held_out.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in answers] == [0] * 20 + [2] * 20 + [4] * 20


def test_the_exported_student_is_the_trained_one() -> None:
    assert main(FIT) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("run/student"), AutoTokenizer.from_pretrained("run/student")
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"scorer.model.{name}"]), name
    before = AutoModelForCausalLM.from_pretrained(embedded_student())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert tokenizer("3+4>").input_ids == AutoTokenizer.from_pretrained(embedded_student())("3+4>").input_ids


def embedded_student() -> Path:
    return Path(embedded.resolve("embedded:student"))


def test_model_checkpoint_on_an_eval_metric_exports_the_best_student_and_early_stopping_stops() -> None:
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
         "init_args": {"monitor": "val/held_out/pass@1", "mode": "max", "filename": "best-{step}"}},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping",
         "init_args": {"monitor": "val/held_out/truncated", "mode": "min", "patience": 1, "min_delta": 0.5}},
    ]  # fmt: skip
    arguments = ["fit", *SMALL, "--trainer.max_steps", "20", "--trainer.val_check_interval", "1"]
    assert main([*arguments, "--trainer.callbacks", json.dumps(callbacks)]) == 0
    assert len(rows()) < 10
    assert list(Path("run/checkpoints").glob("best-*.ckpt"))
    assert (Path("run/student_best") / "model.safetensors").exists()


class Monitors(Callback):
    """Keeps what it could monitor after each step, and after the evaluation that follows it."""

    steps: ClassVar[list[dict[str, float]]] = []
    evaluations: ClassVar[list[dict[str, float]]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        self.evaluations.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_callbacks_can_monitor_what_a_step_and_an_evaluation_log() -> None:
    callback = json.dumps([{"class_path": f"{__name__}.Monitors"}])
    assert main([*FIT, "--trainer.callbacks", callback]) == 0
    logged = [{name: float(value) for name, value in row.items() if value and name != "step"} for row in rows()]
    assert len(Monitors.steps) == 4 and len(Monitors.evaluations) == 3
    for seen, row in zip(Monitors.steps, logged[1:], strict=True):
        own = {name: value for name, value in row.items() if not name.startswith("val/")}
        assert len(own) > 20 and {name: seen[name] for name in own} == pytest.approx(own, rel=1e-6)
    for seen, row in zip(Monitors.evaluations, logged[::2], strict=True):
        assert {name: seen[name] for name in row} == pytest.approx(row, rel=1e-6)


@pytest.mark.parametrize("setting", [["--trainer.precision", "bf16-mixed"], ["--model.dtype", "bfloat16"]])
def test_bf16_trains(setting: list[str]) -> None:
    assert main([*FIT, *setting, "--model.inner_epochs", "2", "--model.optimizer.lr", "1e-3"]) == 0
    assert all(float(row["train/skipped_updates"]) == 0 for row in rows()[1:])
    assert all(float(row["train/grad_norm"]) > 0 for row in rows()[1:])
    before = AutoModelForCausalLM.from_pretrained(embedded_student())
    after = AutoModelForCausalLM.from_pretrained("run/student")
    assert any(
        not torch.equal(p.float(), q.float()) for p, q in zip(before.parameters(), after.parameters(), strict=True)
    )


REFUSED = {
    "gradient_clip_val": (["--trainer.gradient_clip_val", "0.5"], "model.max_grad_norm: 0.5"),
    "accumulate_grad_batches": (["--trainer.accumulate_grad_batches", "2"], "model.tokens_per_micro_batch"),
    "max_epochs": (["--trainer.max_epochs", "2"], "trainer.max_steps"),
    "precision": (["--trainer.precision", "bf16-true"], "model.dtype: bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_trainer_settings_that_cannot_be_honoured_name_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, ours = REFUSED[name]
    assert main([*FIT, *arguments]) == 2
    assert ours in capsys.readouterr().err


def test_learning_rate_schedule_and_tensorboard() -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.5, "total_iters": 2}}
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "tb", "name": "x"}}
    more = ["--model.lr_scheduler", json.dumps(schedule), "--trainer.logger", json.dumps(logger)]
    assert main([*FIT, *more]) == 0
    assert [float(row["train/learning_rate"]) for row in rows()[1:]] == pytest.approx([1.5e-4, 2.25e-4, 3e-4, 3e-4])
    events = EventAccumulator(str(next(Path("tb").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3, 4]


def test_padded_vocabularies_are_accepted_and_their_ids_never_sampled() -> None:
    for name, extra in (("student", 5), ("teacher", 13)):
        folder = embedded.resolve(f"embedded:{name}")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer) + extra, mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[len(tokenizer) + 5 :] = 50.0
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    assert main([*FIT, "--model.student", "./student", "--model.teacher.path", "./teacher"]) == 0
    assert all(0 < float(row["train/divergence"]) < 100 for row in rows()[1:])
    model = AutoModelForCausalLM.from_pretrained("run/student")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained("run/student")) + 5


def test_validate_test_and_predict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FIT) == 0
    for command in ("validate", "test", "predict"):
        arguments = [*SMALL[:-1], f"run-{command}", "--ckpt_path", "run/checkpoints/last.ckpt"]
        assert main([command, *arguments]) == 0
        answers = [json.loads(line) for line in Path(f"run-{command}/eval/held_out.jsonl").read_text().splitlines()]
        assert [answer["index"] for answer in answers] == list(range(20))
    assert "pass@1" in capsys.readouterr().out


def test_nan_losses_are_skipped_and_then_stop_the_run_with_its_last_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds another test's stderr
    BreaksAtThird.calls = 0
    divergence = ["--model.divergence", json.dumps({"class_path": f"{__name__}.BreaksAtThird"})]
    long = ["fit", *SMALL, "--trainer.max_steps", "20", "--trainer.val_check_interval", "100"]
    last = "distillkit.training.checkpoints.LastCheckpoint"
    every = json.dumps([{"class_path": last, "init_args": {"every_n_steps": 1}}])
    settings = ["--model.max_skipped_updates", "3", "--trainer.callbacks", every]
    assert main([*long, *divergence, *settings]) == 1
    assert capsys.readouterr().err == (
        "TrainingStopped: step 5: 3 updates in a row had a non-finite loss or gradient\n"
        "    got:      NaN or Inf\n"
        "    expected: finite numbers\n"
        "    try:      a lower learning rate or model.beta; checkpoints/last.ckpt is from before or holds the same "
        "weights\n"
    )
    assert [float(row["train/skipped_updates"]) for row in rows()[1:]] == [0, 0, 1, 1, 1]
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert saved["distillkit"]["rollout_step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_a_run_without_any_reward_says_so_and_stops(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds another test's stderr
    rewards = ["--model.rewards", json.dumps([{"class_path": f"{__name__}.NeverScores"}])]
    length = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "100"]
    assert main(["fit", *SMALL, *length, *rewards, "--model.max_skipped_updates", "2"]) == 1
    said = capsys.readouterr()
    assert said.err == (
        "TrainingStopped: step 2: no rollout of 2 steps in a row could be scored\n"
        "    got:      undecided/judge 16\n"
        "    expected: rewards\n"
        "    try:      model.rewards: the warnings above say why, such as a server that is down or a deadline too "
        "short\n"
    )
    assert "step 1/20  unscored 16  divergence" in said.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.objective", "trrd", "--model.divergence", "null"],
        ["--model.teacher", "null", "--model.divergence", "null"],
        ["--model.objective", "null"],
        ["--model.divergence", "k1", "--model.distill_through", "advantage"],
        ["--model.divergence", "topk", "--model.divergence.k", "5"],
        ["--model.divergence", "reverse_kl", "--model.masker", "response_level"],
        ["--model.divergence", "jsd", "--model.beta", '{"name": "linear", "start": 0.2, "end": 0, "steps": 3}'],
        ["--model.reference", '{"name": "local", "path": "embedded:student"}', "--model.reference_divergence", "k2",
         "--model.reference_beta", "0.01", "--model.minibatches", "2"],
        ["--model.teacher", CACHED],
        ["--model.schedules", '{"sampler.temperature": {"name": "cosine", "start": 1.2, "end": 0.8, "steps": 4}}'],
    ],
    ids=lambda arguments: "-".join(a.split(".")[-1] for a in arguments[:2]),
)  # fmt: skip
def test_other_methods_from_the_same_file(arguments: list[str]) -> None:
    assert main([*FIT[:-4], "--trainer.max_steps", "2", "--trainer.val_check_interval", "2", *arguments]) == 0
    assert [row["step"] for row in rows()] == ["0", "1", "2"]
    assert all(float(row["train/grad_norm"]) > 0 for row in rows()[1:])


def test_the_quickstart_learns() -> None:
    assert main(["fit", "--config", "quickstart", "--run_dir", "run", "--trainer.val_check_interval", "100"]) == 0
    scores = [float(row["val/held_out/pass@1"]) for row in rows() if row["val/held_out/pass@1"]]
    assert 0.25 <= scores[0] <= 0.60
    assert scores[-1] - scores[0] >= 0.25
