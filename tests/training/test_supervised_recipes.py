"""The shipped recipes of the supervised module, through the command, a few steps each."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from distillkit.cli.main import main
from distillkit.embedded.tokenizer import build_tokenizer


@pytest.fixture
def student(tmp_path: Path) -> str:
    """A random model with the embedded models' tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return str(tmp_path / "student")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Run `distillkit fit`, and return the rows of its `metrics.csv`."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.prompts_per_step", "4"]
    short = [
        "--data.val.source.limit",
        "4",
        "--model.sampler.max_new_tokens",
        "4",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert main(["fit", *arguments, *few, *short, "--run_dir", str(folder)]) == 0
    with (folder / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("recipe", ["embedded_teacher", "embedded_student"])
def test_an_embedded_model_is_made_anew(
    recipe: str, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    rows = run(monkeypatch, folder, "--config", recipe, "--model.student", student)
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(torch.tensor(99.0).log().item(), abs=0.15)
    assert rows[-1]["val/validation/pass@1"] != ""
    made = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert made.config.hidden_size > 16
    assert made.config.vocab_size == len(build_tokenizer())
    assert made.generation_config.eos_token_id == build_tokenizer().eos_token_id


@pytest.mark.parametrize("teacher", [False, True])
def test_gsm8k_solutions_are_learned(
    teacher: bool, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(8)]
    for name in ("train", "test"):
        file = tmp_path / f"data/gsm8k/{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path / "data"))
    more = ["--model.teacher", "local", "--model.teacher.path", student, "--model.divergence", "forward_kl"]
    arguments = [
        "--config",
        "sft_gsm8k",
        "--model.student",
        student,
        *([*more, "--model.beta", "1.0"] if teacher else []),
    ]
    metrics = run(monkeypatch, tmp_path / "run", *arguments)
    steps = [row for row in metrics if row["train/loss"]]
    assert {float(row["train/completion_length"]) for row in steps} == {len(rows[0]["answer"]) + 1}
    assert metrics[-1]["val/gsm8k/pass@1"] != ""
    if teacher:  # the teacher is the untrained student
        assert float(steps[0]["train/divergence"]) == pytest.approx(0.0, abs=1e-6)
        assert float(steps[1]["train/divergence"]) > 0
