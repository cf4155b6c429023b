"""Whole runs with adapters through the command line: what is trained, kept, continued, exported and refused."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillkit import embedded
from distillkit.cli.main import main
from distillkit.lora import LoraSettings, apply_lora
from distillkit.models import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FIT = [
    "fit", "--config", "quickstart", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
    "--model.sampler.max_new_tokens", "12", "--data.val.0.source.limit", "8", "--trainer.accelerator", "cpu",
    "--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--model.optimizer.lr", "1e-2",
    "--trainer.callbacks",
    '[{"class_path": "distillkit.training.checkpoints.LastCheckpoint", "init_args": {"every_n_steps": 1}}]',
]  # fmt: skip
LORA = ["--model.lora.rank", "4", "--model.lora.target_modules", "[q_proj, lm_head]"]


def run(folder: Path, *command: str, killed: bool = False) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == (-9 if killed else 0), done.stdout[-3000:] + done.stderr[-3000:]


def checkpoint(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "-m", "distillkit", *FIT, *LORA)
    return folder / "runs" / "quickstart"


def test_only_adapters_are_trained_and_kept(trained: Path) -> None:
    saved = checkpoint(trained)
    names = list(saved["state_dict"])
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "lm_head"}
    (optimizer,) = saved["optimizer_states"]
    assert len(optimizer["state"]) == len(names)
    assert all(state["exp_avg"].norm() > 0 for state in optimizer["state"].values())
    moved = [value for name, value in saved["state_dict"].items() if ".lora_B." in name]
    assert all(value.norm() > 0 for value in moved)
    config = yaml.safe_load((trained / "config.yaml").read_text())
    expected = {"rank": 4, "alpha": 32, "dropout": 0.0, "target_modules": ["q_proj", "lm_head"], "rslora": False}
    assert config["model"]["lora"] == expected


def test_the_exports_are_the_trained_student(trained: Path) -> None:
    from peft import PeftModel

    settings = LoraSettings(rank=4, target_modules=["q_proj", "lm_head"])
    model = apply_lora(load_causal_lm("embedded:student", where="test"), settings)
    state = {k.removeprefix("scorer.model."): v for k, v in checkpoint(trained)["state_dict"].items()}
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    plain = AutoModelForCausalLM.from_pretrained(trained / "student")
    base: Any = AutoModelForCausalLM.from_pretrained(embedded.resolve("embedded:student"))
    start = {name: value.clone() for name, value in base.state_dict().items()}
    beside: Any = PeftModel.from_pretrained(base, str(trained / "adapter"))
    ids = torch.tensor([load_tokenizer("embedded:student", where="test")("3+4*2>").input_ids])
    with torch.no_grad():
        wanted, merged, adapted = (m(ids).logits.log_softmax(-1) for m in (model, plain, beside))
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapted, wanted)
    changed = {name for name, value in load_file(trained / "student" / "model.safetensors").items()
               if not torch.equal(value, start[name])}  # fmt: skip
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "lm_head"}


def test_killed_and_continued_equals_never_killed(trained: Path, tmp_path: Path) -> None:
    run(tmp_path, "-m", "tests.training.killer", "optimizer", "3", *FIT, *LORA, killed=True)
    folder = tmp_path / "runs" / "quickstart"
    assert 1 <= checkpoint(folder)["distillkit"]["rollout_step"] < 4
    run(tmp_path, "-m", "distillkit", *FIT, *LORA, "--ckpt_path", "last")
    ours, theirs = checkpoint(folder), checkpoint(trained)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    before, after = (load_file(f / "student" / "model.safetensors") for f in (trained, folder))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "got:      no LoRA\n    expected: rank=4 alpha=32"),
        (
            ["--model.lora.rank", "8"],
            "got:      rank=8 alpha=32 target_modules=None rslora=False\n    expected: rank=4",
        ),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused_by_evaluation_too(
    given: list[str], said: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["validate", *FIT[1:-2], "--ckpt_path", str(trained / "checkpoints" / "last.ckpt")]
    assert main([*arguments, *given]) == 2
    assert f"model.lora: not what the checkpoint was trained with\n    {said}" in capsys.readouterr().err


def test_gradient_checkpointing_and_bfloat16_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    more = ["--model.gradient_checkpointing", "true", "--model.dtype", "bfloat16", "--model.head_chunk", "64"]
    assert main([*FIT, *more, "--model.lora.target_modules", "all-linear"]) == 0
    state = checkpoint(Path("runs/quickstart"))["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {value.dtype for value in load_file("runs/quickstart/student/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_adapters_beside_random_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    init = "{model_type: qwen3, hidden_size: 32}"
    assert main(["fit", "--config", "small/sft", "--model.init", init, "--model.lora.rank", "4"]) == 2
    assert "model.lora: adapters beside random weights, which would never learn" in capsys.readouterr().err


REFERENCE = ["--model.reference_divergence", "reverse_kl", "--model.reference_beta", "0.1"]


def divergences(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as stream:
        return [float(row["train/reference_divergence"]) for row in list(csv.DictReader(stream))[1:]]


def test_the_base_as_reference_trains_as_a_copy_of_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    copy = '{"name": "local", "path": "embedded:student"}'
    for folder, reference in (("off", "adapter_off"), ("copy", copy)):
        assert main([*FIT, *LORA, *REFERENCE, "--model.reference", reference, "--run_dir", folder]) == 0
    ours, theirs = divergences(Path("off")), divergences(Path("copy"))
    assert ours[0] == pytest.approx(0, abs=1e-6) and ours[-1] > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    models = json.loads(Path("off/environment.json").read_text())["models"]
    assert models["reference"] == f"adapter_off:{models['student']}:float32"


def test_adapter_off_without_lora_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, *REFERENCE, "--model.reference", "adapter_off"]) == 2
    assert "adapter_off scores with the student's base weights" in capsys.readouterr().err
