"""The `vllm_server` sampler against a real vLLM server on the CPU: `tox -e vllm`."""

from __future__ import annotations

import copy
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit.components import StudentInfo
from distillkit.errors import ConfigError, ModelError, RolloutError
from distillkit.samplers.vllm_server import VLLMServerSampler
from distillkit.scorer import StudentScorer
from distillkit.types import RolloutGroup, SampleRequest
from tests.engines import shared
from tests.engines.shared import gap, in_order, move, requests, student

SMALL: dict[str, Any] = {"max_new_tokens": 24, "kv_cache_gib": 0.25, "enforce_eager": True}


@pytest.fixture(scope="module")
def info() -> StudentInfo:
    return shared.student_info()


@pytest.fixture(scope="module", params=["tied and padded", "lora"])
def pair(request: pytest.FixtureRequest, info: StudentInfo) -> Iterator[tuple[VLLMServerSampler, StudentScorer]]:
    scorer = student(request.param, info)
    sampler = VLLMServerSampler(**SMALL)
    sampler.setup(info)
    sampler.sync(scorer)
    yield sampler, scorer
    sampler.teardown()


@pytest.fixture(scope="module")
def running(info: StudentInfo) -> Iterator[str]:
    """The address of a server for the embedded student, which outlives the samplers that use it."""
    owner = VLLMServerSampler(**SMALL)
    owner.setup(info)
    owner.sync(student("embedded", info))
    yield owner._remote._client.url
    owner.teardown()


@pytest.mark.parametrize("check", shared.CHECKS, ids=lambda check: check.__name__.removeprefix("check_that_"))
def test_the_server_has_the_weights_and_draws_from_them(
    pair: tuple[VLLMServerSampler, StudentScorer], info: StudentInfo, check: Callable[..., None]
) -> None:
    check(*pair, info)


def test_a_lora_student_sends_its_adapter_alone_once_the_server_has_the_rest(
    running: str, info: StudentInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillkit.samplers import vllm_remote

    sent: list[list[str]] = []

    class Counting(vllm_remote.WeightSender):
        def delivery(self, *, complete: bool) -> dict[str, Any]:
            sent.append(sorted({piece.part for piece in self._pieces}))
            return super().delivery(complete=complete)

    monkeypatch.setattr(vllm_remote, "WeightSender", Counting)
    scorer, other = student("lora", info), student("embedded", info)
    sampler, stranger = (VLLMServerSampler(url=running, **SMALL) for _ in range(2))
    for part in (sampler, stranger):
        part.setup(info)
    for _ in range(3):
        sampler.sync(scorer)
        assert gap(scorer, in_order(sampler.sample(requests(info)))) < 1e-5
        move(scorer, steps=1)
    assert sent == [["base", "down", "up", "whole"], ["down", "up"], ["down", "up"]]
    stranger.sync(other)  # as after a new start of the server: its weights are no longer the last ones of this run
    with pytest.raises(RolloutError, match="not this run's last"):
        in_order(sampler.sample(requests(info)))
    sampler.sync(scorer)
    assert sent[-1] == ["base", "down", "up", "whole"]
    assert gap(scorer, in_order(sampler.sample(requests(info)))) < 1e-5


class SyncsOnce(VLLMServerSampler):
    """A sampler whose weights stay those of the first step."""

    def sync(self, student: StudentScorer) -> None:
        if self._remote is None:
            super().sync(student)


class LosesTheAdapter(VLLMServerSampler):
    """A sampler that sends the base weights of a LoRA student only."""

    def sync(self, student: StudentScorer) -> None:
        super().sync(StudentScorer(copy.deepcopy(student.model).unload(), vocab_limit=student.vocab_limit))


class SamplesWarmer(VLLMServerSampler):
    """A sampler whose engine draws at another temperature than the requests ask for."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        given = {request.group_id: request for request in requests}
        for group in super().sample([replace(r, settings=replace(r.settings, temperature=1.6)) for r in requests]):
            yield replace(group, request=given[group.request.group_id])


@pytest.mark.parametrize(
    ("cls", "kind", "caught_at"),
    [
        (VLLMServerSampler, "embedded", None),
        (VLLMServerSampler, "lora", None),
        (SyncsOnce, "embedded", 2),
        (LosesTheAdapter, "lora", 1),
        (SamplesWarmer, "embedded", 1),
    ],
)
def test_a_sync_that_is_broken_is_caught_at_the_next_step(
    cls: type[VLLMServerSampler], kind: str, caught_at: int | None, running: str, info: StudentInfo
) -> None:
    sampler = cls(url=running, max_engine_gap=1e-3, **SMALL)
    shared.check_the_guard(sampler, student(kind, info), info, caught_at)


def test_another_model_behind_the_address_is_refused(running: str, info: StudentInfo) -> None:
    scorer = student("tied and padded", info)
    sampler = VLLMServerSampler(url=running, **SMALL)
    sampler.setup(info)
    with pytest.raises(ModelError) as caught:
        sampler.sync(scorer)
    text = str(caught.value)
    assert f"model.sampler: the server at {running} cannot be used" in text
    assert "another model is served: tie_word_embeddings: True (student) and False (server)" in text
    assert "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model" in text
    assert """--hf-overrides '{"vocab_size": 99}'""" in text


def test_a_context_that_is_too_short_is_refused(running: str, info: StudentInfo) -> None:
    sampler = VLLMServerSampler(url=running, **{**SMALL, "max_new_tokens": 256})
    sampler.setup(info)
    with pytest.raises(ConfigError, match=r"context is too short\n    got:      sequences of 256 tokens"):
        sampler.sync(student("embedded", info))


def test_a_prompt_that_leaves_too_few_positions_is_refused(
    pair: tuple[VLLMServerSampler, StudentScorer], info: StudentInfo
) -> None:
    sampler, _ = pair
    long = replace(requests(info)[0], prompt_ids=tuple(range(4, 24)) * 12)
    with pytest.raises(RolloutError, match=r"240 prompt tokens \+ 24 new ones = 264\n    expected: at most 256"):
        sampler.sample([long])


def test_another_vocabulary_behind_the_address_is_refused(running: str, info: StudentInfo) -> None:
    fewer = replace(info, vocab_limit=info.vocab_limit - 3)
    sampler = VLLMServerSampler(url=running, **SMALL)
    sampler.setup(fewer)
    limits = rf"vocab_size: {fewer.vocab_limit} \(student\) and {info.vocab_limit} \(server\)"
    with pytest.raises(ModelError, match=f"another model is served: {limits}"):
        sampler.sync(student("embedded", fewer))


def test_a_server_that_cannot_start_says_why(info: StudentInfo) -> None:
    sampler = VLLMServerSampler(**{**SMALL, "kv_cache_gib": 2.0**20})
    sampler.setup(info)
    with pytest.raises(ModelError) as caught:
        sampler.sync(student("embedded", info))
    text = str(caught.value)
    assert text.startswith("model.sampler: the vLLM server did not start\n    | ")
    assert "it ended with exit code" in text and "memory" in text
    sampler.teardown()
    log = Path(text.partition("(its log: ")[2].partition(")")[0])
    assert "Traceback" in log.read_text()
    shutil.rmtree(log.parent)


def test_a_server_that_dies_stops_the_rollouts_and_leaves_nothing(info: StudentInfo) -> None:
    sampler = VLLMServerSampler(retry_s=5, **SMALL)
    sampler.setup(info)
    sampler.sync(student("embedded", info))
    server = sampler._remote._server
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) == 0
    second = VLLMServerSampler(port=server.port, **SMALL)
    second.setup(info)
    with pytest.raises(ConfigError, match=rf"model.sampler.port: {server.port} cannot be listened on"):
        second.sync(student("embedded", info))
    groups = sampler.sample(requests(info, group_size=64))
    next(groups)
    os.killpg(server._process.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="the vLLM server gives no rollouts"):
        for _ in range(2):  # what had arrived before is fine
            list(groups)
            groups = sampler.sample(requests(info))
    sampler.teardown()
    assert not server.folder.exists()


KILLED = """
import sys, time
from tests.engines import shared
from distillkit.samplers.vllm_server import VLLMServerSampler
info = shared.student_info()
sampler = VLLMServerSampler(max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True)
sampler.setup(info)
sampler.sync(shared.student("embedded", info))
print(sampler._remote._server._process.pid, flush=True)
time.sleep(600)
"""


def test_the_server_ends_with_a_trainer_that_is_killed() -> None:
    trainer = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert trainer.stdout is not None
    lines = iter(trainer.stdout)
    leader = next(int(line) for line in lines if line.strip().isdigit())
    members = [pid for pid in os.listdir("/proc") if pid.isdigit() and _group(pid) == leader]
    assert len(members) >= 2  # the server and its engine
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while any(_group(pid) == leader for pid in members) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in members if _group(pid) == leader]


def _group(pid: str) -> int | None:
    """The process group of a process that still runs."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else int(group)


RANK = """
import os, torch
from dataclasses import replace
from tests.engines import shared
from tests.engines.shared import gap, in_order, move, requests
from distillkit.errors import ModelError
from distillkit.samplers.vllm_server import VLLMServerSampler
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
info, url = shared.student_info(), os.environ["SERVER"]
scorer = shared.student("embedded", info)
sampler = VLLMServerSampler(url=url, max_new_tokens=24)
sampler.setup(info)
mine = [replace(request, seed=request.seed + (rank << 20)) for request in requests(info)]
drawn = []
for _ in range(3):
    sampler.sync(scorer)
    groups = in_order(sampler.sample(mine))
    assert gap(scorer, groups) < 1e-5, gap(scorer, groups)
    drawn.append([r.completion_ids.tolist() for group in groups for r in group.rollouts])
    move(scorer, steps=1)
both = [None, None]
torch.distributed.all_gather_object(both, drawn[0])
assert both[0] != both[1], "the ranks repeat each other"
other = VLLMServerSampler(url=url, max_new_tokens=24)
other.setup(info)
try:
    other.sync(shared.student("tied and padded", info))
except ModelError as error:
    assert "another model is served" in str(error) and str(error).startswith("rank 0") == (rank == 1)
    print("fine", flush=True)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_share_one_server(running: str) -> None:
    shared.run_two_ranks(RANK, SERVER=running)


def test_the_quickstart_runs_with_a_server(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["fit", "--config", "quickstart", "--model.sampler", "vllm_server"]
    options = ["--model.sampler.enforce_eager", "true", "--model.sampler.kv_cache_gib", "0.5", "--run_dir", str(run)]
    short = ["--trainer.max_steps", "3", "--data.val.0.source.limit", "50"]
    done = subprocess.run(
        [sys.executable, "-m", "distillkit", *command, *options, *short], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train/engine_gap"]]
    assert len(rows) == 3 and all(float(row["train/engine_gap"]) < 1e-5 for row in rows)
    assert (run / "student" / "model.safetensors").is_file()
