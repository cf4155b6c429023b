"""Rollouts of a real vLLM server, sampled while the student learns from those of the step before: `tox -e vllm`."""

from __future__ import annotations

import asyncio
import copy
import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

import distillkit.loss
import distillkit.step
from distillkit.ahead import RolloutsAhead
from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.components import RolloutSampler, StudentInfo
from distillkit.divergences.sampled import K2
from distillkit.errors import TrainingStopped
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.samplers.vllm import VLLMSampler
from distillkit.samplers.vllm_client import ServerClient
from distillkit.samplers.vllm_server import VLLMServerSampler
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.step import DistillationStep
from distillkit.teachers.local import LocalTeacher
from distillkit.types import RolloutBatch, SampleRequest, StepOutput
from tests.engines import shared
from tests.engines.shared import student

SMALL: dict[str, Any] = {"group_size": 4, "max_new_tokens": 24, "kv_cache_gib": 0.25, "enforce_eager": True}
WAIT_S = 100.0


@pytest.fixture(scope="module")
def info() -> StudentInfo:
    return shared.student_info()


@pytest.fixture(scope="module")
def running(info: StudentInfo) -> Iterator[str]:
    """The address of a server for the embedded student, which outlives the samplers that use it."""
    owner = VLLMServerSampler(**SMALL)
    owner.setup(info)
    owner.sync(student("embedded", info))
    yield owner._remote._client.url
    owner.teardown()


@pytest.fixture(params=["vllm_server", "vllm"])
def sampler(request: pytest.FixtureRequest, running: str) -> Iterator[RolloutSampler]:
    part = VLLMSampler(**SMALL) if request.param == "vllm" else VLLMServerSampler(url=running, **SMALL)
    yield part
    part.teardown()


class Recording(LocalBackend):
    """Keeps the weights before, and the gradient of, every update."""

    def __init__(self, scorer: StudentScorer, lr: float) -> None:
        super().__init__(scorer, torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=0.0))
        self.gradients: list[Tensor] = []
        self.weights: list[dict[str, Tensor]] = []

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        self.weights.append(copy.deepcopy(self.scorer.state_dict()))
        found = [p.grad for p in self.scorer.parameters()]
        self.gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        return super().clip_and_norm(max_norm)


def requests(info: StudentInfo, step: int, version: int) -> list[SampleRequest]:
    return [
        type(plain)(
            **{**vars(plain), "group_id": 4 * step + i, "seed": (4 * step + i + 1) << 40, "policy_version": version}
        )
        for i, plain in enumerate(shared.requests(info, group_size=4))
    ]


def stepper(
    sampler: RolloutSampler, info: StudentInfo, *, ahead: bool, lr: float
) -> tuple[DistillationStep, Recording]:
    teacher = LocalTeacher(path="embedded:teacher")
    for part in (teacher, sampler):
        part.setup(info)
    parts = StepParts(sampler=sampler, teacher=teacher, divergence=K2(), beta=Constant(value=1.0))
    settings = StepSettings(one_step_off=ahead, max_grad_norm=None)
    step = DistillationStep(parts, settings, student("embedded", info), info)
    return step, Recording(step.scorer, lr)


def run(
    step: DistillationStep, backend: LocalBackend, info: StudentInfo, *, steps: int, ahead: bool = True
) -> list[StepOutput]:
    outputs = []
    try:
        for n in range(steps):
            following = requests(info, n + 1, n) if ahead and n + 1 < steps else ()
            outputs.append(step.run(requests(info, n, n), step=n, backend=backend, following=following))
    finally:
        step.close()
    return outputs


def logprobs(weights: dict[str, Tensor], rollouts: RolloutBatch, info: StudentInfo) -> Tensor:
    """Log-probs [N, L] of some weights, computed apart from the step."""
    scorer = student("embedded", info)
    scorer.load_state_dict(weights)
    with torch.no_grad():
        return scorer(rollouts, ScorePlan(sampling_temperature=1.0, distil_temperature=1.0)).logprobs


def test_rollouts_are_one_update_old_and_corrected_for_it(
    sampler: RolloutSampler, info: StudentInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Tensor]] = []
    plain = distillkit.loss._off_policy

    def recorded(*arguments: Any) -> Any:
        correction = plain(*arguments)
        seen.append((arguments[-1], correction.distil))
        return correction

    monkeypatch.setattr(distillkit.loss, "_off_policy", recorded)
    step, backend = stepper(sampler, info, ahead=True, lr=2e-3)
    outputs = run(step, backend, info, steps=4)
    assert [output.metrics["train/staleness"] for output in outputs] == [0.0, 1.0, 1.0, 1.0]
    assert all(output.metrics["train/engine_gap"] < 1e-5 for output in outputs[:-1])
    assert len(seen) == 4, "one micro-batch a step"
    for n, (output, (cut, weights)) in enumerate(zip(outputs, seen, strict=True)):
        rollouts, drawn_at = output.rollouts, max(n - 1, 0)
        mask, behaviour = rollouts.loss_mask, rollouts.behaviour_logprobs
        assert set(rollouts.policy_version[mask].tolist()) == {drawn_at}
        by_step = [logprobs(own, rollouts, info) for own in backend.weights]
        gaps = [float((own - behaviour)[mask].abs().mean()) for own in by_step]
        assert gaps[drawn_at] < 1e-5
        assert all(gap > 1e-3 for i, gap in enumerate(gaps) if i != drawn_at)
        ratio = (by_step[n] - by_step[drawn_at]).exp().clamp(max=2.0)
        found = torch.zeros(mask.shape)
        found[cut] = weights
        torch.testing.assert_close(found[mask], ratio[mask], rtol=1e-3, atol=1e-3)
        if n:
            assert output.metrics["train/staleness_gap"] == pytest.approx(gaps[n], rel=1e-3)
            assert (ratio[mask] - 1).abs().max() > 0.05, "nothing to correct"


class Timeline:
    """What happens when: requests for rollouts that are sampled ahead begin only within an update, and one of them
    has to be finished within it. Where nothing overlaps, one waits for the other for ever (here: `WAIT_S`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.updating, self.answered = threading.Event(), threading.Event()
        self.ahead, self.late = False, []
        start, update, post = RolloutsAhead.start, distillkit.step.update, ServerClient._post

        def started(own: Any, *arguments: Any) -> None:
            self.updating.clear()
            self.answered.clear()
            self.ahead = True
            start(own, *arguments)

        def updated(batch: Any, *arguments: Any) -> Any:
            self.events.append("update begins")
            self.updating.set()
            if self.ahead and not self.answered.wait(WAIT_S):
                self.late.append("no rollout was finished while an update ran")
            result = update(batch, *arguments)
            self.events.append("update ends")
            self.ahead = False
            return result

        async def posted(own: Any, http: Any, path: str, body: Any) -> Any:
            probe = body["sampling_params"]["max_tokens"] < SMALL["max_new_tokens"]
            if self.ahead and not probe:
                if not await asyncio.to_thread(self.updating.wait, WAIT_S):
                    self.late.append("no update ran while rollouts were waited for")
                self.events.append("request begins")
            answer = await post(own, http, path, body)
            if self.ahead and not probe:
                self.events.append("request ends")
                self.answered.set()
            return answer

        monkeypatch.setattr(RolloutsAhead, "start", started)
        monkeypatch.setattr(distillkit.step, "update", updated)
        monkeypatch.setattr(ServerClient, "_post", posted)


def test_the_next_rollouts_are_sampled_while_the_update_runs(
    running: str, info: StudentInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = Timeline(monkeypatch)
    step, backend = stepper(VLLMServerSampler(url=running, **SMALL), info, ahead=True, lr=2e-3)
    run(step, backend, info, steps=3)
    assert not timeline.late
    updates = " ".join(timeline.events).split("update begins ")[1:]
    assert len(updates) == 3
    for within in updates[:2]:
        during = within.partition("update ends")[0]
        assert "request begins" in during and "request ends" in during
    assert updates[2] == "update ends", "the last step samples nothing ahead"


def test_where_the_policy_does_not_move_the_update_is_that_of_the_plain_step(
    sampler: RolloutSampler, info: StudentInfo
) -> None:
    """Both learn from the same rollouts: the engine may draw other tokens in another company of requests."""
    step, backend = stepper(sampler, info, ahead=True, lr=0.0)
    outputs = run(step, backend, info, steps=2)
    plain, other = stepper(sampler, info, ahead=False, lr=0.0)
    for n, output in enumerate(outputs):
        given = {group: rows for group, rows in _groups(output.rollouts)}
        plain.ahead.load_state_dict(given)
        again = plain.run(requests(info, n, n), step=n, backend=other)
        assert torch.equal(again.rollouts.tokens, output.rollouts.tokens)
        ours, theirs = backend.gradients[n], other.gradients[n]
        assert (ours - theirs).norm() < 1e-5 * theirs.norm() and theirs.norm() > 0


def _groups(rollouts: RolloutBatch) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rollouts of a batch as a checkpoint has them."""
    for group in dict.fromkeys(rollouts.group_id.tolist()):
        rows = [i for i, own in enumerate(rollouts.group_id.tolist()) if own == group]
        own = []
        for i in rows:
            mask = rollouts.loss_mask[i]
            fields = ("tokens", "behaviour_logprobs", "loss_mask", "policy_version")
            tokens, behaviour, drawn, version = (getattr(rollouts, name)[i][mask] for name in fields)
            own.append(
                {
                    "completion_ids": tokens,
                    "behaviour_logprobs": behaviour,
                    "loss_mask": drawn,
                    "policy_version": version,
                    "finish_reason": "length" if rollouts.truncated[i] else "stop",
                    "text": rollouts.texts[i],
                }
            )
        yield group, own


class SyncsOnce(VLLMServerSampler):
    """A sampler whose weights stay those of the first step."""

    def sync(self, student: StudentScorer) -> None:
        if self._remote is None:
            super().sync(student)


def test_a_broken_sync_is_found_though_rollouts_are_stale(running: str, info: StudentInfo) -> None:
    sampler = SyncsOnce(url=running, max_engine_gap=1e-3, **SMALL)
    step, backend = stepper(sampler, info, ahead=True, lr=2e-3)
    with pytest.raises(TrainingStopped, match="step 2: the engine that sampled and the trainer disagree"):
        run(step, backend, info, steps=4)
    assert len(backend.weights) == 1, "no second update"


FIT = ["fit", "--config", "quickstart", "--model.sampler", "vllm_server", "--model.one_step_off", "true"]
EVERY = [
    {"class_path": "distillkit.training.checkpoints.LastCheckpoint", "init_args": {"every_n_steps": 1}},
    {
        "class_path": "distillkit.reporting.run_report.RunReport",
        "init_args": {"rollouts_every": 1, "rollouts_limit": None},
    },
]


def fit(run: Path, url: str | None, *more: str, steps: int = 4) -> list[str]:
    """Arguments of a short run that keeps every checkpoint and rollout."""
    where = ["--model.sampler.enforce_eager", "true", "--model.sampler.kv_cache_gib", "0.25"]
    where += [] if url is None else ["--model.sampler.url", url]
    short = ["--trainer.max_steps", str(steps), "--data.val.0.source.limit", "20", "--data.prompts_per_step", "4"]
    return [*FIT, *where, *short, "--trainer.callbacks", json.dumps(EVERY), "--run_dir", str(run), *more]


def call(*command: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ, timeout=timeout)


def recorded(run: Path, step: int) -> dict[int, list[list[int]]]:
    """Token ids of a step's rollouts, by group, as the run wrote them."""
    groups: dict[int, list[list[int]]] = {}
    for line in (run / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(int(row["group_id"]), []).append(row["tokens"]["id"])
    return groups


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def test_a_killed_run_goes_on_with_the_rollouts_that_were_sampled_ahead(running: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    died = call("-m", "tests.training.killer", "update", "3", *fit(run, running))
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["distillkit"]
    assert saved["rollout_step"] == 2
    ahead = {int(i): [r["completion_ids"].tolist() for r in own] for i, own in saved["step"]["ahead"].items()}
    assert len(ahead) == 4 and all(len(own) == 8 for own in ahead.values())
    assert {int(v) for own in saved["step"]["ahead"].values() for r in own for v in r["policy_version"]} == {1}

    done = call("-m", "distillkit", *fit(run, running), "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert recorded(run, 3) == ahead
    assert column(run, "train/staleness") == [0.0, 1.0, 1.0, 1.0]
    assert all(value < 1e-5 for value in column(run, "train/engine_gap"))
    assert (run / "student" / "model.safetensors").is_file()


WITH_SERVER = """
import os, signal, sys
import distillkit.step
from distillkit.ahead import RolloutsAhead
from distillkit.cli.main import main
from distillkit.samplers.vllm_process import ServerProcess
servers, updates = [], 0
make, update, start = ServerProcess.__init__, distillkit.step.update, RolloutsAhead.start
def made(own, *arguments, **named):
    servers.append(own)
    make(own, *arguments, **named)
def started(own, *arguments):
    if updates == 1:  # nothing that is asked for now is answered
        os.killpg(servers[0]._process.pid, signal.SIGSTOP)
        arguments = (*arguments[:3], None)  # nor waited for before the update, as a probe would be
    start(own, *arguments)
ServerProcess.__init__ = made
RolloutsAhead.start = started
"""

SERVER_DIES = """
def dies(*arguments):
    global updates
    updates += 1
    if updates == 2:
        os.killpg(servers[0]._process.pid, signal.SIGKILL)
    return update(*arguments)
distillkit.step.update = dies
raise SystemExit(main(sys.argv[1:]))
"""


def test_a_server_that_dies_beside_an_update_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = call("-c", WITH_SERVER + SERVER_DIES, *fit(run, None, "--model.sampler.retry_s", "5", steps=6))
    assert done.returncode == 1
    assert "model.sampler: the vLLM server gives no rollouts" in done.stderr, done.stderr[-3000:]
    assert "the server ended with exit code -9" in done.stderr
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["distillkit"]
    assert saved["rollout_step"] in (1, 2, 3)


SERVER_STOPS = """
def fails(*arguments):
    global updates
    updates += 1
    if updates == 2:
        raise RuntimeError("the update failed") if sys.argv[1] == "error" else KeyboardInterrupt
    return update(*arguments)
distillkit.step.update = fails
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("kind", "text"), [("error", "RuntimeError: the update failed"), ("interrupt", "stopped by")])
def test_an_error_in_the_update_does_not_wait_for_a_server_that_is_silent(tmp_path: Path, kind: str, text: str) -> None:
    """An answer may take `timeout_s`, 600 s here; the process has to end without it."""
    run = tmp_path / "run"
    done = call("-c", WITH_SERVER + SERVER_STOPS, kind, *fit(run, None, steps=6), timeout=300)
    assert done.returncode == 1 and text in done.stderr + done.stdout, done.stderr[-3000:]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["distillkit"]
    assert saved["rollout_step"] == 1 and len(saved["step"]["ahead"]) == 4
