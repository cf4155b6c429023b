"""A teacher on a real vLLM server is asked while another real server still samples: `tox -e vllm`."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit import embedded
from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.clock import PhaseClock
from distillkit.divergences.topk import TopK
from distillkit.models import load_causal_lm
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.samplers.vllm_server import VLLMServerSampler
from distillkit.step import DistillationStep
from distillkit.teachers.local import LocalTeacher
from distillkit.teachers.mixture import MixtureTeacher
from distillkit.teachers.vllm import VLLMTeacher
from distillkit.teachers.vllm_client import ServerPool
from distillkit.types import RolloutGroup, SampleRequest, TeacherScores
from tests.engines import shared
from tests.engines.vllm_server import VLLMServer

GROUPS = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    running = VLLMServer(embedded.resolve("embedded:teacher"), tmp_path_factory.mktemp("vllm") / "server.log")
    try:
        yield running.start()
    finally:
        running.kill()


class Stamped(VLLMServerSampler):
    """Notes when its groups are finished."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.finished: list[float] = []
        for group in super().sample(requests):
            self.finished.append(time.monotonic())
            yield group


@pytest.fixture(scope="module")
def sampler() -> Iterator[Stamped]:
    """One request at a time: groups are finished one after the other."""
    info = shared.student_info()
    part = Stamped(group_size=4, max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True, concurrency=1)
    part.setup(info)
    part.sync(shared.student("embedded", info))
    yield part
    part.teardown()


def requests() -> list[SampleRequest]:
    plain = shared.requests(shared.student_info(), group_size=4)
    return [replace(plain[i % len(plain)], group_id=i, seed=(i + 1) << 30) for i in range(GROUPS)]


def close(ours: TeacherScores, theirs: TeacherScores) -> None:
    assert torch.equal(ours.valid, theirs.valid)
    for name in ("sampled", "topk"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine - other)[ours.valid].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_the_teacher_is_asked_before_the_last_rollout_is_finished(
    server: VLLMServer, sampler: Stamped, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    send = ServerPool.send

    def stamped(own: Any, where: Any, path: str, entries: Any = None) -> Any:
        if entries is not None:
            asked.append(time.monotonic())
        return send(own, where, path, entries)

    monkeypatch.setattr(ServerPool, "send", stamped)
    info, student = shared.student_info(), shared.student("embedded", shared.student_info())
    teacher: Any = VLLMTeacher(urls=(server.url,), path="embedded:teacher")
    if kind == "mixture":
        other = VLLMTeacher(urls=(server.url,), path="embedded:teacher")
        teacher = MixtureTeacher(teachers={"a": teacher, "b": other}, route="kind")
    teacher.setup(info)
    asked.clear()  # the start-up check
    parts = StepParts(sampler=sampler, teacher=teacher, divergence=TopK(k=4), beta=Constant(value=1.0))
    step = DistillationStep(parts, StepSettings(), student, info)
    backend = LocalBackend(student, torch.optim.SGD(student.parameters(), lr=0.0))
    wanted = [replace(request, row={"kind": "ab"[i % 2]}) for i, request in enumerate(requests())]
    try:
        clock, context = PhaseClock(), step.context(0)
        rollouts = step.rollout(wanted, context, backend, clock)
        _, early, _ = step.judge(rollouts, context, clock)
        assert len(sampler.finished) == GROUPS and len(asked) == GROUPS * 4
        before = sum(moment < sampler.finished[-1] for moment in asked)
        assert sampler.finished[0] < min(asked) < sampler.finished[-1], "the teacher was asked after the last rollout"
        assert before >= 4, "at least a whole group"
        local = LocalTeacher(path="embedded:teacher", dtype="float32")
        local.setup(info)
        step._early = {}
        _, late, _ = step.judge(rollouts, context, clock)
        assert early is not None and late is not None and len(asked) == 2 * GROUPS * 4
        close(early, late)
        close(early, local.score(rollouts, step._score_requests(context)["teacher"]))
    finally:
        step.close()
        teacher.teardown()


def test_the_pages_run_has_the_scores_of_a_local_teacher(server: VLLMServer, tmp_path: Path) -> None:
    """The command of docs/scaling.md, with a teacher on a server."""
    run = tmp_path / "run"
    report = {"rollouts_every": 1, "rollouts_limit": None}
    options = {
        "model.sampler.enforce_eager": "true",
        "model.sampler.kv_cache_gib": "0.25",
        "model.teacher": "vllm",
        "model.teacher.urls": f"[{server.url}]",
        "model.teacher.path": "embedded:teacher",
        "trainer.max_steps": "3",
        "trainer.callbacks": json.dumps(
            [{"class_path": "distillkit.reporting.run_report.RunReport", "init_args": report}]
        ),
        "data.val.0.source.limit": "20",
        "run_dir": str(run),
    }
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text().partition("## Sampling ahead")[2]
    shown = next(line for line in page.splitlines() if line.startswith("distillkit fit"))
    command = [sys.executable, "-m", *shlex.split(shown)]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    with (run / "metrics.csv").open() as stream:
        staleness = [float(row["train/staleness"]) for row in csv.DictReader(stream) if row["train/staleness"]]
    assert staleness == [0.0, 1.0, 1.0]
    info = shared.student_info()
    teacher = load_causal_lm("embedded:teacher", where="teacher", dtype="float32")
    for step in (1, 2, 3):
        lines = [json.loads(line) for line in (run / "rollouts" / f"step-{step:06d}.jsonl").open()]
        assert len(lines) == 16 * 8
        for line in lines[::8]:
            prompt, ids = info.tokenizer(line["prompt"])["input_ids"], line["tokens"]["id"]
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(line["tokens"]["teacher_logprobs"]), expected, rtol=0, atol=1e-4)
