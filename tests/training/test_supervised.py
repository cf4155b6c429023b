"""Supervised training: its loss against plain torch, what must not change its gradient, and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.betas.linear import Linear
from distillkit.components import RewardFn, ScoreRequest, StudentInfo, TeacherScorer
from distillkit.data import DataSource, EvalSet, PreparedPrompt, PromptBatch, PromptData
from distillkit.divergences.full import ForwardKL
from distillkit.divergences.sampled import K1, K2, K3
from distillkit.divergences.topk import TopK
from distillkit.errors import ConfigError, DataError
from distillkit.models import enable_gradient_checkpointing
from distillkit.prepared import StepSettings
from distillkit.samplers.hf import HFSampler
from distillkit.scorer import StudentScorer
from distillkit.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, StudentExport
from distillkit.training.given import SupervisedStep, given_rollouts
from distillkit.training.supervised import SupervisedModule
from distillkit.training.warmup import WarmupCosine
from distillkit.types import RewardOutput, RolloutBatch, StepOutput, TeacherScores
from tests import toy
from tests.test_scorer import local_teacher

EOS = 1
GIVEN = [
    ([2, 3, 4], [5, 6, 7, EOS]),
    ([5, 6], [EOS]),
    ([7, 8, 9, 10, 11], [3, EOS]),
    ([4], [12, 13, 2, 2, 9, 8, EOS]),
    ([10, 2], [6, 6, 6, EOS]),
]


def rollouts(given: Sequence[tuple[list[int], list[int]]] = GIVEN, info: StudentInfo | None = None) -> RolloutBatch:
    prompts = [
        PreparedPrompt(prompt_ids=tuple(p), prompt="p", row={}, index=i, completion_ids=tuple(c))
        for i, (p, c) in enumerate(given)
    ]
    return given_rollouts(prompts, offset=100, student=info or toy.info())


def logits_of(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Logits [T, V] that predict the completion of one unpadded row."""
    return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]


def cross_entropy(model: nn.Module, aggregation: str = "token") -> Tensor:
    """The loss in one piece: every row on its own, no padding."""
    found = [
        F.cross_entropy(logits_of(model, p, c), torch.tensor(c), reduction="none" if aggregation == "token" else "mean")
        for p, c in GIVEN
    ]
    return torch.cat(found).mean() if aggregation == "token" else torch.stack(found).mean()


def forward_kl(model: nn.Module, teacher: nn.Module, temperature: float, aggregation: str = "token") -> Tensor:
    """Mean of KL(teacher ‖ student) at completion tokens, from whole distributions."""
    values = []
    for prompt, completion in GIVEN:
        logp = (logits_of(model, prompt, completion) / temperature).log_softmax(-1)
        logq = (logits_of(teacher, prompt, completion).detach() / temperature).log_softmax(-1)
        values.append(F.kl_div(logp, logq, log_target=True, reduction="none").sum(-1))
    return torch.cat(values).mean() if aggregation == "token" else torch.stack([v.mean() for v in values]).mean()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def learn(
    batch: RolloutBatch | None = None,
    *,
    scorer: StudentScorer | None = None,
    settings: StepSettings | None = None,
    **parts: Any,
) -> tuple[Tensor, StepOutput]:
    """The gradient of one step, and what it reports."""
    scorer = scorer or toy.scorer(0)
    found: list[Tensor] = []

    class Keeping(LocalBackend):
        def optimizer_step(self) -> None:
            found.append(gradient(scorer))

    no_clip = replace(settings or StepSettings(), max_grad_norm=None)
    step = SupervisedStep(student=toy.info(), settings=no_clip, **parts)
    backend = Keeping(scorer, torch.optim.SGD(scorer.parameters(), lr=0.0))
    output = step.run(rollouts() if batch is None else batch, step=0, backend=backend)
    return found[0], output


def distilling(**more: Any) -> dict[str, Any]:
    return {"teacher": local_teacher(toy.model(1)), "divergence": ForwardKL(), "beta": Constant(value=0.7), **more}


def close(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    gap = (ours - theirs).norm() / theirs.norm()
    assert gap < relative, f"relative difference of the gradient: {gap:.2e}"


# ---- the loss


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_is_the_cross_entropy_of_completion_and_end_token_alone(aggregation: Any) -> None:
    model = toy.model(0)
    expected = 0.5 * cross_entropy(model, aggregation)
    expected.backward()
    found, output = learn(sft_weight=0.5, aggregation=aggregation)
    close(found, gradient(model))
    assert output.metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert output.metrics["train/cross_entropy"] == pytest.approx(cross_entropy(model).item(), rel=1e-6)
    assert output.metrics["train/completion_length"] == pytest.approx(18 / 5)
    assert output.metrics["train/grad_norm"] == pytest.approx(gradient(model).norm().item(), rel=1e-5)
    assert (output.updates, output.skipped) == (1, 0)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_offline_forward_kl_is_that_of_whole_distributions(aggregation: Any) -> None:
    model, teacher = toy.model(0), toy.model(1)
    expected = 0.7 * forward_kl(model, teacher, 1.7, aggregation)
    expected.backward()
    parts = distilling(sft_weight=0.0, aggregation=aggregation)
    found, output = learn(settings=StepSettings(distil_temperature=1.7), **parts)
    close(found, gradient(model))
    assert output.metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert output.metrics["train/divergence"] == pytest.approx(forward_kl(model, teacher, 1.7).item(), rel=1e-5)
    assert output.metrics["train/cross_entropy"] == pytest.approx(cross_entropy(model).item(), rel=1e-6)
    assert output.metrics["train/beta"] == 0.7


def test_both_terms_add_up() -> None:
    model, teacher = toy.model(0), toy.model(1)
    (0.25 * cross_entropy(model) + 0.7 * forward_kl(model, teacher, 1.0)).backward()
    found, output = learn(sft_weight=0.25, **distilling())
    close(found, gradient(model))
    assert {"time/teacher", "time/update", "time/step"} <= set(output.metrics)
    assert {"tokens_per_second/teacher", "tokens_per_second/update"} <= set(output.metrics)


def test_top_k_of_every_token_is_the_whole_distribution() -> None:
    settings = StepSettings(distil_temperature=1.7)
    whole, expected = learn(settings=settings, **distilling(sft_weight=0.0))
    topk = TopK(k=len(toy.VOCABULARY), direction="forward", tail=False)
    found, output = learn(settings=settings, **distilling(sft_weight=0.0, divergence=topk))
    close(found, whole)
    assert output.metrics["train/divergence"] == pytest.approx(expected.metrics["train/divergence"], rel=1e-5)


def test_end_tokens_are_learned_when_the_padding_is_the_end_token() -> None:
    expected, _ = learn()
    found, output = learn(rollouts(info=replace(toy.info(), pad_token_id=EOS)))
    assert output.rollouts.tokens[1, 3:].tolist() == [EOS] * 5
    close(found, expected)


SAME: Mapping[str, Callable[[], tuple[Tensor, StepOutput]]] = {
    "micro-batches of one row": lambda: learn(settings=StepSettings(tokens_per_micro_batch=1), **distilling()),
    "micro-batches of 12 tokens": lambda: learn(settings=StepSettings(tokens_per_micro_batch=12), **distilling()),
    "head chunks of 1 position": lambda: learn(scorer=toy.scorer(0, head_chunk=1), **distilling()),
    "head chunks of 7 positions": lambda: learn(scorer=toy.scorer(0, head_chunk=7), **distilling()),
    "order": lambda: learn(rollouts(GIVEN[::-1]), **distilling()),
    "padding": lambda: learn(_padded(rollouts()), **distilling()),
    "gradient checkpointing": lambda: learn(scorer=_checkpointed(), **distilling()),
}


def _padded(batch: RolloutBatch) -> RolloutBatch:
    names = ("tokens", "attention_mask", "loss_mask", "behaviour_logprobs", "policy_version")
    return replace(batch, **{name: F.pad(getattr(batch, name), (0, 9)) for name in names})


def _checkpointed() -> StudentScorer:
    scorer = toy.scorer(0)
    enable_gradient_checkpointing(scorer.model)
    return scorer.train()


@pytest.mark.parametrize("name", SAME)
def test_gradient_does_not_change_with(name: str) -> None:
    close(SAME[name]()[0], learn(**distilling())[0])


def test_gradient_per_sequence_does_not_change_with_micro_batches() -> None:
    split = learn(settings=StepSettings(tokens_per_micro_batch=12), aggregation="sequence", **distilling())[0]
    close(split, learn(aggregation="sequence", **distilling())[0])
    assert (split - learn(**distilling())[0]).norm() / split.norm() > 0.01


def test_per_token_values_line_up_with_the_completion() -> None:
    _, output = learn(**distilling())
    batch, values = output.rollouts, output.per_token
    assert sorted(values) == ["divergence", "student_logprobs", "teacher_logprobs"]
    model, teacher = toy.model(0), toy.model(1)
    for i, (prompt, completion) in enumerate(GIVEN):
        span = slice(len(prompt), len(prompt) + len(completion))
        ids = torch.tensor(completion)[:, None]
        for name, side in (("student_logprobs", model), ("teacher_logprobs", teacher)):
            expected = logits_of(side, prompt, completion).log_softmax(-1).gather(-1, ids)[:, 0]
            torch.testing.assert_close(values[name][i, span], expected.detach(), rtol=0, atol=1e-5)
        assert batch.behaviour_logprobs[i, span].isnan().all()
        assert batch.policy_version[i, span].tolist() == [-1] * len(completion)
        assert batch.loss_mask[i].nonzero().flatten().tolist() == list(range(span.start, span.stop))
    assert batch.group_id.tolist() == [100, 101, 102, 103, 104]
    assert batch.texts[0] == "345"
    assert batch.finish_reason == ("stop",) * 5


def test_a_teacher_is_not_asked_while_beta_is_zero() -> None:
    class Silent(TeacherScorer):
        offers = ScoreRequest(full=True)

        def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
            raise AssertionError("asked")

        def identity(self) -> str:
            return "silent"

    plain, _ = learn()
    found, output = learn(teacher=Silent(), divergence=ForwardKL(), beta=Linear(start=0.0, end=1.0, steps=10))
    assert torch.equal(found, plain)
    assert output.metrics["train/beta"] == 0.0
    assert "train/divergence" not in output.metrics


def test_a_token_that_the_model_does_not_have_is_refused_with_its_row() -> None:
    with pytest.raises(DataError) as caught:
        rollouts([GIVEN[0], ([2], [15, EOS])], info=toy.info(vocab_limit=15))
    assert str(caught.value) == (
        "data.train: row 2, column 'completion': a token that the model does not have\n"
        "    got:      '=', id 15\n"
        "    expected: ids below 15\n"
        "    try:      a tokenizer that fits model.student"
    )


# ---- combinations that cannot work


class TopKServer(TeacherScorer):
    """Knows sampled tokens and the ten most likely ones."""

    offers = ScoreRequest(sampled=True, topk=10)

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        raise AssertionError("refused at the start: nothing is scored")

    def identity(self) -> str:
        return "server"


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "k1": (
        {"teacher": TopKServer(), "divergence": K1(), "beta": 0.1},
        "model.divergence: K1 is an estimate over the student's own samples, and here the tokens are given\n"
        "    got:      sampled log-probs\n"
        "    expected: a divergence of whole distributions or of top-k tokens\n"
        "    try:      model.divergence: forward_kl",
    ),
    "k2": (
        {"teacher": TopKServer(), "divergence": K2(), "beta": 0.1},
        "model.divergence: K2 is an estimate over the student's own samples, and here the tokens are given\n"
        "    got:      sampled log-probs\n"
        "    expected: a divergence of whole distributions or of top-k tokens\n"
        "    try:      model.divergence: forward_kl",
    ),
    "k3": (
        {"teacher": TopKServer(), "divergence": K3(), "beta": 0.1},
        "model.divergence: K3 is an estimate over the student's own samples, and here the tokens are given\n"
        "    got:      sampled log-probs\n"
        "    expected: a divergence of whole distributions or of top-k tokens\n"
        "    try:      model.divergence: forward_kl",
    ),
    "no teacher": (
        {"divergence": ForwardKL(), "beta": 0.1},
        "model.teacher: divergence ForwardKL needs a teacher\n"
        "    got:      null\n"
        "    expected: a teacher that gives whole distributions\n"
        "    try:      model.teacher: {name: local, path: ...}, or model.divergence: null",
    ),
    "no beta": (
        {"teacher": TopKServer(), "divergence": TopK(k=5)},
        "model.beta: the divergence has no coefficient\n"
        "    got:      null\n"
        "    expected: a number\n"
        "    try:      model.beta: 1.0",
    ),
    "a teacher that knows too little": (
        {"teacher": TopKServer(), "divergence": TopK(k=20), "beta": 0.1},
        "model.divergence: TopK needs what the teacher TopKServer does not give\n"
        "    got:      sampled log-probs, top-10 log-probs\n"
        "    expected: its top 20 log-probs (it gives 10)\n"
        "    try:      model.teacher: {name: local, path: ...} gives everything",
    ),
    "a teacher that nothing asks": (
        {"teacher": TopKServer()},
        "model.teacher: nothing is asked of the teacher\n"
        "    got:      divergence null\n"
        "    try:      model.divergence: forward_kl, or model.teacher: null",
    ),
    "nothing to learn": (
        {"sft_weight": 0.0},
        "model: nothing to learn from\n"
        "    got:      sft_weight 0 and divergence null\n"
        "    try:      model.sft_weight: 1.0, or model.divergence: forward_kl with a model.teacher",
    ),
    "a negative weight": (
        {"sft_weight": -1.0},
        "model.sft_weight\n    got:      -1.0\n    expected: a finite number, at least 0",
    ),
    "no model_type": (
        {"init": {"hidden_size": 8}},
        "model.init.model_type: not a causal language model\n"
        "    got:      nothing\n"
        "    expected: a model_type of transformers that has a causal language model\n"
        "    try:      qwen3",
    ),
    "an unknown model_type": (
        {"init": {"model_type": "qwen33"}},
        "model.init.model_type: not a causal language model\n"
        "    got:      'qwen33'\n"
        "    expected: a model_type of transformers that has a causal language model\n"
        "    try:      qwen3",
    ),
    "a wrong value": (
        {"init": {"model_type": "qwen3", "hidden_size": "wide"}},
        "model.init: not what Qwen3Config takes\n"
        "    got:      Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str "
        "(value: 'wide')",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_the_module_is_made(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        SupervisedModule(student="unused", **arguments)
    assert str(caught.value) == message


def test_an_unknown_field_of_a_new_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        SupervisedModule(student="unused", init={"model_type": "qwen3", "hiden_size": 8})
    first, got, expected, hint = str(caught.value).split("\n")
    assert first == "model.init.hiden_size: Qwen3Config has no such field"
    assert got == "    got:      hiden_size"
    assert "hidden_size, id2label, initializer_range, intermediate_size" in expected
    assert hint == "    try:      hidden_size"


# ---- whole runs


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")


@pytest.fixture
def student(tmp_path: Path) -> str:
    folder = tmp_path / "student"
    toy.model(0).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sums(tmp_path: Path) -> str:
    """Sums modulo 10, some with a longer completion than others."""
    file = tmp_path / "sums.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "completion": f"{(a + b) % 10}" + "=7" * (b % 3)} for a in range(8) for b in range(5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
schedule = partial(WarmupCosine, total_steps=12, warmup_steps=3)


class Watch(Callback):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, SupervisedModule) and pl_module.last_output is not None
        self.metrics.append(dict(pl_module.last_output.metrics))


def trainer(folder: Path, steps: int, *callbacks: Callback, **more: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    chosen = {
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        **quiet,
        **more,
    }
    return pl.Trainer(max_steps=steps, plugins=[AtomicCheckpointIO()], callbacks=list(callbacks), **chosen)


def data(path: str, **more: Any) -> PromptData:
    return PromptData(train=DataSource(path=path), prompts_per_step=8, **more)


def module(student: str, **more: Any) -> SupervisedModule:
    chosen = {"optimizer": adamw, "lr_scheduler": schedule, "tokens_per_micro_batch": 24, **more}
    return SupervisedModule(student=student, **chosen)


def parameters(module: SupervisedModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.scorer.parameters()])


def test_a_run_equals_a_plain_torch_loop_and_lowers_the_loss(tmp_path: Path, student: str, sums: str) -> None:
    ours, watch = module(student), Watch()
    trainer(tmp_path, 12, watch).fit(ours, datamodule=data(sums))

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = adamw(model.parameters())
    prompts = data(sums)
    prompts.prepare(toy.tokenizer(), completions=True)
    losses, rates = [], []
    for step, batch in zip(range(12), prompts.train_dataloader(), strict=False):
        share = (step + 1) / 3 if step < 3 else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 3) / 9)).item())
        optimizer.param_groups[0]["lr"] = 1e-2 * share
        loss = _plain_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"])

    assert [m["train/loss"] for m in watch.metrics] == pytest.approx(losses, rel=1e-3)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(parameters(ours), expected, rtol=1e-3, atol=1e-4)
    assert losses[-1] < 0.7 * losses[0]


def _plain_loss(model: nn.Module, batch: PromptBatch) -> Tensor:
    rows = [(list(p.prompt_ids), list(p.completion_ids or ())) for p in batch.prompts]
    length = max(len(p) + len(c) for p, c in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for i, (prompt, completion) in enumerate(rows):
        ids[i, : len(prompt + completion)] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : len(prompt + completion)] = torch.tensor(completion)
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_resumed_run_is_bit_identical(tmp_path: Path, student: str, sums: str) -> None:
    whole = module(student)
    trainer(tmp_path / "whole", 8, LastCheckpoint(every_n_steps=8)).fit(whole, datamodule=data(sums))
    trainer(tmp_path / "cut", 5, LastCheckpoint(every_n_steps=5)).fit(module(student), datamodule=data(sums))
    last = tmp_path / "cut/checkpoints/last.ckpt"
    resumed, watch = module(student), Watch()
    after = trainer(tmp_path / "cut", 8, LastCheckpoint(every_n_steps=8), watch)
    torch.manual_seed(12345)
    after.fit(resumed, datamodule=data(sums), ckpt_path=str(last))
    assert len(watch.metrics) == 3
    assert torch.equal(parameters(resumed), parameters(whole))
    ours, theirs = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("cut", "whole"))
    assert ours["distillkit"]["cursor"] == theirs["distillkit"]["cursor"] == 64
    assert ours["distillkit"]["rollout_step"] == 8
    assert torch.equal(ours["distillkit"]["random"]["torch"], theirs["distillkit"]["random"]["torch"])
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    for index, state in theirs["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, ours["optimizer_states"][0]["state"][index][key]) for key, value in state.items())


def test_the_student_is_exported_and_answers_what_it_learned(tmp_path: Path, student: str, sums: str) -> None:
    ours = module(student)
    trainer(tmp_path, 3, StudentExport()).fit(ours, datamodule=data(sums))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), parameters(ours))
    assert AutoTokenizer.from_pretrained(tmp_path / "student")("3+4=")["input_ids"] == [5, 12, 6, 15]


ENTRIES = {
    "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_new_model_follows_from_its_entries_and_the_seed(
    tmp_path: Path, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokenizer"
    toy.tokenizer().save_pretrained(folder)

    class Start(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            starts.append(parameters(pl_module))  # type: ignore[arg-type]

    starts: list[Tensor] = []
    for seed, noise in (("7", 1), ("7", 2), ("8", 1)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.manual_seed(noise)
        ours = module(str(folder), init=ENTRIES)
        trainer(tmp_path / seed, 2, Start(), StudentExport()).fit(ours, datamodule=data(sums))
    fields = {key: value for key, value in ENTRIES.items() if key != "model_type"}
    torch.manual_seed(7)
    expected = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(toy.VOCABULARY), pad_token_id=0, eos_token_id=1, **fields))
    assert torch.equal(starts[0], torch.cat([p.detach().flatten() for p in expected.parameters()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "7/student")
    assert exported.config.vocab_size == len(toy.VOCABULARY)
    assert (exported.generation_config.eos_token_id, exported.generation_config.pad_token_id) == (1, 0)


def test_a_new_model_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path: Path, student: str, sums: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, 1).fit(module(student, init={**ENTRIES, "vocab_size": 10}), datamodule=data(sums))
    assert str(caught.value) == (
        "model.init.vocab_size: smaller than the tokenizer's vocabulary\n"
        "    got:      10\n"
        "    expected: at least 17\n"
        "    try:      leave it out"
    )


class Seven(RewardFn):
    """1 for a completion that begins with the gold answer; refuses rows without one."""

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        return [(i, "no gold") for i, row in enumerate(rows) if "answer" not in row]

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        right = [t.startswith(str(row["answer"])) for t, row in zip(rollouts.texts, rollouts.rows, strict=True)]
        return RewardOutput.single("seven", [float(ok) for ok in right], correct=right, answers=list(rollouts.texts))


def problems(tmp_path: Path) -> list[EvalSet]:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": f"{a + 1}"}) + "\n" for a in range(5)))
    return [EvalSet(name="sums", source=DataSource(path=str(file)))]


def test_evaluation_sets_are_answered_by_the_sampler_and_training_rows_need_no_gold(
    tmp_path: Path, student: str, sums: str
) -> None:
    ours = module(student, sampler=HFSampler(max_new_tokens=4), rewards=[Seven()], lr_scheduler=None)
    prompts = data(sums, val=problems(tmp_path))
    run = trainer(tmp_path, 30, val_check_interval=30, check_val_every_n_epoch=None)
    run.fit(ours, datamodule=prompts)
    learned, trained = run.callback_metrics["val/sums/pass@1"].item(), parameters(ours)
    assert learned >= 0.4
    again = trainer(tmp_path, 30)
    again.validate(ours, datamodule=prompts, verbose=False)
    assert again.callback_metrics["val/sums/pass@1"].item() == learned
    assert torch.equal(parameters(ours), trained)


def test_evaluation_sets_without_a_sampler_are_refused(tmp_path: Path, student: str, sums: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(tmp_path, 1).fit(module(student), datamodule=data(sums, val=problems(tmp_path)))
    assert str(caught.value) == (
        "model.sampler: evaluation sets are answered by sampling (sums)\n"
        "    got:      null\n"
        "    expected: a sampler\n"
        "    try:      model.sampler: {name: hf, max_new_tokens: 512}, or data.val: []"
    )


def test_a_plateau_scheduler_watches_the_loss(tmp_path: Path, student: str, sums: str) -> None:
    plateau = partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=1e6, threshold_mode="abs"
    )
    watch = Watch()
    ours = module(student, lr_scheduler=plateau)
    trainer(tmp_path, 3, watch).fit(ours, datamodule=data(sums))
    assert ours.optimizers(use_pl_optimizer=False).param_groups[0]["lr"] == pytest.approx(1e-2 / 4)


# ---- two ranks

TWO_RANKS = """
import sys
import torch
from tests.training import test_supervised as t
from distillkit.divergences.full import ForwardKL
from distillkit.teachers.local import LocalTeacher

devices, student, teacher, sums, folder, out = int(sys.argv[1]), *sys.argv[2:]
parts = {"teacher": LocalTeacher(path=teacher), "divergence": ForwardKL(), "beta": 0.5, "tokens_per_micro_batch": 14}
module, watch = t.module(student, **parts), t.Watch()
strategy = {"strategy": "ddp", "devices": 2} if devices == 2 else {"devices": 1}
trainer = t.trainer(t.Path(folder), 3, watch, **strategy)
trainer.fit(module, datamodule=t.data(sums, shuffle=False))
torch.save({"parameters": t.parameters(module), "metrics": watch.metrics}, f"{out}-{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path, student: str) -> None:
    teacher = tmp_path / "teacher"
    toy.model(1).save_pretrained(teacher)
    toy.tokenizer().save_pretrained(teacher)
    # Of every eight rows the first four, which are rank 0's, are short: the ranks need unlike numbers of micro-batches.
    rows = [{"prompt": f"{i % 10}=", "completion": "7" if i % 8 < 4 else "12345678901"} for i in range(24)]
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        out = tmp_path / f"out-{devices}"
        command = [
            sys.executable,
            str(script),
            str(devices),
            student,
            str(teacher),
            str(uneven),
            str(tmp_path / "run"),
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "out-1-0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"out-2-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    torch.testing.assert_close(ranks[0]["parameters"], one["parameters"], rtol=1e-4, atol=1e-5)
    names = ("train/loss", "train/cross_entropy", "train/divergence", "train/grad_norm", "train/completion_length")
    for ours, theirs in zip(ranks[0]["metrics"], one["metrics"], strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-4)
