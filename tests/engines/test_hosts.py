"""The scripts of docs/scaling.md on two hosts over TCP, one of which loses its network on the way."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit import embedded
from tests.engines.hosts import Hosts

ROOT = Path(__file__).parents[2]
SCRIPTS = dict(
    re.findall(r"`(\w+\.sh)`.*?\n\n```bash\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
)
QUICK = [
    "--trainer.accelerator", "cpu", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
    "--model.sampler.max_new_tokens", "12", "--data.val.0.source.limit", "4", "--model.validate_at_start", "false",
    "--trainer.callbacks",
    '[{"class_path": "distillkit.training.checkpoints.LastCheckpoint", "init_args": {"every_n_steps": 1}}]',
]  # fmt: skip


@pytest.fixture
def hosts(capsys: pytest.CaptureFixture[str]) -> Iterator[Hosts]:
    made = Hosts()
    with capsys.disabled():
        print(f" two hosts: {made.kind} ", end="")
    yield made
    made.close()


def rows(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / "metrics.csv").open() as stream:
            return [row for row in csv.DictReader(stream) if row.get("train/reward")]
    except FileNotFoundError:
        return []


def ended(processes: list[subprocess.Popen[bytes]], logs: list[Path], timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("it hangs:\n" + "\n".join(log.read_text()[-3000:] for log in logs))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_and_a_server_train_as_one_host_does_and_go_on_after_a_loss(hosts: Hosts, tmp_path: Path) -> None:
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text.replace("#!/usr/bin/env bash", f"#!/usr/bin/env bash\ncd {tmp_path}"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    student = str(embedded.resolve("embedded:student"))
    small = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "250000000"]
    served = {"STUDENT": student, "PATH": path, "PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    hosts.start(0, ["bash", str(tmp_path / "serve_student.sh"), *small], tmp_path / "server.log", **served)
    url = f"http://{hosts.addresses[0]}:8123"

    def train(name: str, nodes: int, *more: str) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
        logs = [tmp_path / f"{name}-{k}.log" for k in range(nodes)]
        command = ["bash", str(tmp_path / "train.sh"), *QUICK, "--model.sampler", "vllm_server"]
        command += ["--model.sampler.url", url, *more]
        place = {"SERVERS": url, "HOSTS": str(nodes), "GPUS": str(2 // nodes), "CONFIG": "quickstart"}
        place |= {"MASTER_ADDR": hosts.addresses[0], "PATH": path, "PYTHONPATH": str(ROOT)}
        return [hosts.start(k, command, logs[k], NODE_RANK=str(k), **place) for k in range(nodes)], logs

    one, logs = train("one", 1, "--trainer.max_steps", "3", "--run_dir", str(tmp_path / "one"))
    assert ended(one, logs, 300) == [0], logs[0].read_text()[-3000:] + (tmp_path / "server.log").read_text()[-3000:]
    before = [hosts.received(k) for k in range(2)] if hosts.kind == "namespaces" else []

    run = tmp_path / "runs" / "quickstart"
    both, logs = train("two", 2, "--trainer.max_steps", "500")
    deadline = time.monotonic() + 240
    while len(rows(run)) < 4 and time.monotonic() < deadline and both[0].poll() is None:
        time.sleep(0.2)
    assert len(rows(run)) >= 4, logs[0].read_text()[-3000:]
    if before:
        assert all(hosts.received(k) - before[k] > 1_000_000 for k in range(2)), "both ranks exchange over the cable"
    hosts.cut(both[1])
    assert 0 not in ended(both, logs, 150)
    said = [log.read_text() for log in logs]
    assert "TrainingStopped: rank 1 on " in said[0] and "no word from it" in said[0], said[0][-3000:]
    if hosts.kind == "namespaces":
        assert f"TrainingStopped: rank 0 on {hosts.addresses[0]} has ended" in said[1], said[1][-3000:]
    assert json.loads((run / "status.json").read_text())["state"] == "failed"

    hosts.mend()
    done = len(rows(run))
    again, logs = train("again", 2, "--trainer.max_steps", str(done + 2))
    assert ended(again, logs, 240) == [0, 0], logs[0].read_text()[-3000:] + logs[1].read_text()[-3000:]
    assert f"continuing {run.relative_to(tmp_path)}" in logs[0].read_text()
    found = rows(run)
    assert [int(row["step"]) for row in found] == list(range(1, done + 3))
    assert all(float(row["train/engine_gap"]) < 1e-4 and math.isfinite(float(row["train/loss"])) for row in found)
    for row, single in zip(found, rows(tmp_path / "one"), strict=False):
        assert row["train/completion_length"] == single["train/completion_length"]
        assert float(row["train/loss"]) == pytest.approx(float(single["train/loss"]), rel=1e-4, abs=1e-6)
    assert (run / "student" / "model.safetensors").is_file()
