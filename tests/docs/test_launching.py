"""The scripts and settings of docs/scaling.md; tests/engines/test_hosts.py runs those of two hosts for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
SCRIPTS = dict(re.findall(r"`(\w+\.sh)`.*?\n\n```bash\n(.*?)```", PAGE, re.DOTALL))

STUBS = {
    "scontrol": '[ "$3" = ALL ] && printf "n%s\\n" 0 1 2 3 4 5 || printf "%s\\n" ${3//,/ }',
    "srun": """\
while [ "${1#--}" != "$1" ]; do
  case $1 in --nodelist=*) export SLURM_STEP_NODELIST=${1#*=};; esac
  shift
done
SLURM_PROCID=1 exec "$@" """,
    "curl": 'echo "$@" >> asked',
    "python": f'exec {sys.executable} -c "import json, sys; sys.stdout.write(json.dumps(sys.argv[1:]) + chr(10))" "$@"',
}
"""What a cluster has, in small: each says what it was asked for."""


def config_in(printed: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(printed[printed.index("# lightning") :])  # DeepSpeed may speak first
    return parsed


def test_the_page_has_the_scripts_it_speaks_of() -> None:
    assert set(SCRIPTS) == {"serve_student.sh", "serve_teacher.sh", "train.sh", "job.sh"}


def test_the_slurm_job_starts_both_servers_and_the_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in STUBS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text.replace("CONFIG=my.yaml", "CONFIG=quickstart"))
    place = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "ALL"}
    done = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=place, capture_output=True, text=True, timeout=60, check=True
    )
    started = [json.loads(line) for line in done.stdout.splitlines()]
    servers = {words[words.index("--port") + 1]: words for words in started if "--port" in words}
    assert servers["8123"][:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "Qwen/Qwen3-8B-Base"]
    assert servers["8000"][3] == "Qwen/Qwen3-32B"
    trainer = next(words for words in started if words[1] == "torch.distributed.run")
    launched, fit = trainer[: trainer.index("distillkit") - 1], trainer[trainer.index("distillkit") + 1 :]
    assert launched[2:] == [
        "--nnodes", "4", "--node-rank", "1", "--nproc-per-node", "8", "--master-addr", "n2", "--master-port", "29500",
    ]  # fmt: skip
    asked = (tmp_path / "asked").read_text()
    assert "http://n0:8123/health" in asked and "http://n1:8000/health" in asked

    monkeypatch.chdir(tmp_path)
    fit.remove("--ckpt_path")
    fit.remove("last")
    with pytest.raises(SystemExit):
        main([*fit, "--print_config"])
    parsed = config_in(capsys.readouterr().out)
    assert (parsed["trainer"]["num_nodes"], parsed["trainer"]["devices"]) == (4, 8)
    assert parsed["model"]["sampler"]["init_args"]["url"] == "http://n0:8123"
    assert parsed["model"]["teacher"]["init_args"]["urls"] == ["http://n1:8000"]


OURS = "distillkit.training.strategies"


@pytest.mark.parametrize(
    "strategy", [f"{OURS}.fsdp2.FSDP2Strategy", f"{OURS}.zero.ZeroStrategy", "lightning.pytorch.strategies.DDPStrategy"]
)
def test_the_time_out_of_the_process_group_can_be_set(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "timeout" in block)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(shown.replace(f"{OURS}.fsdp2.FSDP2Strategy", strategy))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart", "--config", str(recipe), "--print_config"])
    parsed = config_in(capsys.readouterr().out)["trainer"]["strategy"]
    assert parsed["class_path"] == strategy and str(parsed["init_args"]["timeout"]) in ("0:10:00", "600")
