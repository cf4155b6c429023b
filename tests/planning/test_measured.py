"""The planned memory of a rank against the peak that a process really reached, above what its imports take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from distillkit.cli.main import main
from tests import toy

ROOT = Path(__file__).parents[2]
GIB = 2**30

SETTINGS: dict[str, dict[str, Any]] = {
    # logits of 151,936 columns
    "vocabulary": {
        "student": Qwen3Config(
            vocab_size=151_936, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
        ),
        "prompts": 4, "prompt": 8, "new": 48,
    },
    # what the layers keep for the backward pass
    "activations": {
        "student": Qwen2Config(
            vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "prompts": 6, "prompt": 32, "new": 192,
    },
    # weights, gradients and the optimizer's state
    "optimizer": {
        "student": Qwen3Config(
            vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
            num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        ),
        "prompts": 2, "prompt": 8, "new": 16,
    },
    # a divergence over the whole vocabulary, beside its teacher, over several micro-batches
    "divergence": {
        "student": Qwen3Config(
            vocab_size=96_000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        ),
        "teacher": Qwen3Config(
            vocab_size=96_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
        ),
        "prompts": 4, "prompt": 16, "new": 112,
        "model": {"divergence": "reverse_kl", "beta": 1.0, "tokens_per_micro_batch": 1024},
    },
}  # fmt: skip


def checkpoint(folder: Path, config: Any) -> str:
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, setting: dict[str, Any]) -> Path:
    model: dict[str, Any] = {
        "student": checkpoint(folder / "student", setting["student"]),
        "sampler": {"name": "hf", "group_size": 4, "max_new_tokens": setting["new"]},
        "rewards": [{"class_path": "tests.planning.measured.noise"}],
        "objective": "grpo",
        **setting.get("model", {}),
    }
    if "teacher" in setting:
        model["teacher"] = {"name": "local", "path": checkpoint(folder / "teacher", setting["teacher"])}
    tree = {
        "model": model,
        "data": {"prompts_per_step": setting["prompts"], "max_prompt_tokens": setting["prompt"]},
        "trainer": {"max_steps": 3, "accelerator": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_within_a_fifth_of_what_was_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path, SETTINGS[name])
    capsys.readouterr()
    assert main(["plan", "--config", str(config), "--gpus", "1", "--gpu-memory", "16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    planned = max(phase["sum"] for phase in plan["memory_bytes"].values())
    command = [sys.executable, "-m", "tests.planning.measured", str(config), "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["updates"] == 3
    assert found["peak"] >= GIB, f"{found['peak'] / GIB:.2f} GiB show little"
    assert planned == pytest.approx(found["peak"], rel=0.2), f"{planned / GIB:.2f} and {found['peak'] / GIB:.2f} GiB"
    print(f"{name}: planned {planned / GIB:.2f} GiB, measured {found['peak'] / GIB:.2f} GiB")
