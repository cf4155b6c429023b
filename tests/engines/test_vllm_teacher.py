"""The `vllm` teacher against a real vLLM server on the CPU: `tox -e vllm`."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit import embedded
from distillkit.components import StudentInfo
from distillkit.errors import ConfigError, ModelError, ScoringError
from distillkit.models import load_causal_lm, load_tokenizer
from distillkit.samplers.hf import HFSampler
from distillkit.scorer import StudentScorer
from distillkit.teachers.local import LocalTeacher
from distillkit.teachers.vllm import VLLMTeacher
from distillkit.testing import check
from distillkit.types import RolloutBatch, SampleRequest, SamplingSettings, ScoreRequest, TeacherScores
from tests.engines.vllm_server import VLLMServer

PROMPTS = ["8*9+7>", "1+2*3-4>", "5-6>", "3+4*5-6+7>"]
STEPS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    running = VLLMServer(embedded.resolve("embedded:teacher"), log, "--served-model-name", "teacher")
    running.command += ["--max-logprobs", "64"]
    try:
        yield running.start()
    finally:
        running.kill()


@pytest.fixture(scope="module")
def info() -> StudentInfo:
    tokenizer = load_tokenizer("embedded:student", where="student")
    return StudentInfo(
        tokenizer=tokenizer,
        vocab_limit=len(tokenizer),
        eos_token_ids=(int(tokenizer.eos_token_id),),
        pad_token_id=int(tokenizer.pad_token_id),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def rollouts(info: StudentInfo) -> RolloutBatch:
    """The student's own, of different lengths, some tokens of them not its own."""
    sampler = HFSampler(max_new_tokens=24)
    sampler.setup(info)
    model = load_causal_lm("embedded:student", where="student", dtype="float32")
    sampler.sync(StudentScorer(model, vocab_limit=info.vocab_limit))
    settings = SamplingSettings(group_size=8, max_new_tokens=24)
    requests = [
        SampleRequest(
            prompt_ids=tuple(info.tokenizer(prompt)["input_ids"]),
            prompt=prompt,
            row={},
            group_id=10 - i,
            seed=(i + 1) << 40,
            settings=settings,
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    groups = sorted(sampler.sample(requests), key=lambda group: -group.request.group_id)
    return RolloutBatch.from_groups(groups, info.pad_token_id)


@pytest.fixture(scope="module")
def local(info: StudentInfo) -> LocalTeacher:
    part = LocalTeacher(path="embedded:teacher", dtype="float32")
    part.setup(info)
    return part


def close(ours: TeacherScores, theirs: TeacherScores) -> None:
    """Both say the same, but for rounding; where two tokens are all but equally likely, either may be the k-th."""
    assert torch.equal(ours.valid, theirs.valid)
    for name in ("sampled", "topk"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert (mine - other)[ours.valid].abs().max() < 1e-4
    if ours.topk is not None and theirs.topk is not None:
        moved = (ours.topk_ids != theirs.topk_ids)[ours.valid]
        gaps = theirs.topk[ours.valid].diff(dim=-1).abs()
        near = torch.nn.functional.pad(gaps < 1e-4, (1, 1), value=True)
        assert (~moved | near[:, :-1] | near[:, 1:]).all()


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("k", [0, 1, 16, 64])
def test_scores_are_the_local_teachers(
    server: VLLMServer, local: LocalTeacher, info: StudentInfo, rollouts: RolloutBatch, concurrency: int, k: int
) -> None:
    part = VLLMTeacher(urls=(server.url,), path="embedded:teacher", max_logprobs=64, concurrency=concurrency)
    part.setup(info)
    try:
        request = ScoreRequest(sampled=True, topk=k)
        for index in (torch.arange(len(rollouts)), torch.tensor([30, 2, 17, 5]), torch.tensor([9])):
            batch = rollouts.select(index)
            close(part.score(batch, request), local.score(batch, request))
    finally:
        part.teardown()


def test_it_is_a_teacher_like_any_other(server: VLLMServer, info: StudentInfo, rollouts: RolloutBatch) -> None:
    part = VLLMTeacher(urls=(server.url, f"{server.url}/v1"), path="embedded:teacher", model="teacher")
    check(part, rollouts=rollouts.select(torch.arange(0, 32, 4)), student=info)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (ConfigError, {"model": "qwen"}, r"model.teacher.model: .* serves another model\n.*'qwen'\n.*teacher"),
        (ConfigError, {"max_logprobs": 65}, r"fewer than 65 log-probs per token\n.*\n.*vllm serve MODEL --max-logp"),
    ],
)
def test_settings_that_do_not_fit_the_server(
    server: VLLMServer, info: StudentInfo, kind: type[Exception], settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(kind, match=text):
        VLLMTeacher(**{"urls": (server.url,), "path": "embedded:teacher", **settings}).setup(info)


def test_another_tokenizer_behind_the_address_is_refused(info: StudentInfo, tmp_path: Path) -> None:
    """The model is right, what its ids stand for is not."""
    folder = tmp_path / "tokenizer"
    info.tokenizer.save_pretrained(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    plain = sorted(vocab.values())[len(vocab) // 2 :]
    turned = dict(zip(plain, [*plain[1:], plain[0]], strict=True))
    file["model"]["vocab"] = {token: turned.get(i, i) for token, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    wrong = VLLMServer(embedded.resolve("embedded:teacher"), tmp_path / "log", "--tokenizer", str(folder)).start()
    try:
        with pytest.raises(ModelError) as caught:
            VLLMTeacher(urls=(wrong.url,), path="embedded:teacher").setup(info)
    finally:
        wrong.kill()
    said = str(caught.value)
    assert "model.teacher.urls[0]: the model behind it has another tokenizer than model.teacher.path\n" in said
    assert wrong.url in said and "try:      serve the model of model.teacher.path" in said


def test_a_server_with_a_smaller_vocabulary(
    server: VLLMServer, info: StudentInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLMTeacher, "vocab_size", info.vocab_limit + 29)
    wide = type(info)(**{**vars(info), "vocab_limit": info.vocab_limit + 29})
    with pytest.raises(ModelError, match=r"another vocabulary than model.teacher.path\n.*Token id 127 is out of voc"):
        VLLMTeacher(urls=(server.url,), path="embedded:teacher").setup(wide)


def test_a_rollout_longer_than_the_context(server: VLLMServer, info: StudentInfo, rollouts: RolloutBatch) -> None:
    part = VLLMTeacher(urls=(server.url,), path="embedded:teacher")
    part.setup(info)
    batch = rollouts.select(torch.tensor([0]))
    long = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, 256 - batch.tokens.shape[1]), value=value)
        for name, value in (("tokens", 5), ("attention_mask", True), ("loss_mask", True))
    }
    try:
        with pytest.raises(ScoringError, match=r"of group 10 is too long for .*\n.* = 257\n    expected: at most 256"):
            part.score(RolloutBatch(**{**vars(batch), **long}), ScoreRequest(sampled=True))
    finally:
        part.teardown()


def steps_done(run: Path) -> int:
    """Rollout steps in a run's metrics."""
    try:
        rows = list(csv.DictReader((run / "metrics.csv").open()))
    except FileNotFoundError:
        return 0
    return len([row for row in rows if row.get("train/divergence")])


def recorded(run: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step, as the run wrote them."""
    return [json.loads(line) for line in (run / "rollouts" / f"step-{step:06d}.jsonl").open()]


def test_a_server_killed_in_the_middle_of_a_run_and_started_again_loses_no_rollout(
    server: VLLMServer, info: StudentInfo, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    every = {"class_path": "distillkit.reporting.run_report.RunReport"}
    options = {
        "model.teacher": "vllm",
        "model.teacher.urls": f"[{server.url}]",
        "model.teacher.path": "embedded:teacher",
        "trainer.max_steps": str(STEPS),
        "trainer.val_check_interval": "100",
        "trainer.callbacks": json.dumps([{**every, "init_args": {"rollouts_every": 1, "rollouts_limit": None}}]),
        "data.val.0.source.limit": "20",
        "run_dir": str(run),
    }
    command = [sys.executable, "-m", "distillkit", "fit", "--config", "quickstart"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    with log.open("wb") as output:
        fit = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while steps_done(run) < 2 and fit.poll() is None:
            time.sleep(0.01)
        server.kill()
        while "no server answers" not in log.read_text() and fit.poll() is None:
            time.sleep(0.05)
        assert fit.poll() is None, log.read_text()[-3000:]
        before = steps_done(run)
        server.start()
        assert fit.wait(240) == 0, log.read_text()[-3000:]
    finally:
        fit.kill()
        fit.wait()
    assert 2 <= before < STEPS == steps_done(run)
    said = log.read_text()
    assert "waiting up to 600 s for one to return" in said and f"{server.url} answers again" in said
    teacher = load_causal_lm("embedded:teacher", where="teacher", dtype="float32")
    for step in range(1, STEPS + 1):
        lines = recorded(run, step)
        assert len(lines) == 16 * 8
        for line in lines:
            prompt, ids = info.tokenizer(line["prompt"])["input_ids"], line["tokens"]["id"]
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(line["tokens"]["teacher_logprobs"]), expected, rtol=0, atol=1e-4)
