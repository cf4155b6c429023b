"""The GSM8K and Knights and Knaves recipes on real data, with a tiny random checkpoint and recorded completions."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distillkit.cli.main import main
from distillkit.cli.shipped import find_config
from distillkit.cli.yaml_file import load_yaml
from distillkit.reporting.rollouts import read_rollouts

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("DISTILLKIT_DATA") or Path(__file__).parents[2] / "../shared/data").resolve()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there: the real problem sets are not part of the package; set DISTILLKIT_DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLKIT_DATA", str(DATA))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A random Qwen3 with a byte-level BPE tokenizer trained on the problems themselves."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["question"] for line in (DATA / "gsm8k/test.jsonl").open()][:200]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, max_position_embeddings=4096,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def few(recipe: str, checkpoint: str, *more: str) -> list[str]:
    """A few steps of a recipe, small enough for two cores."""
    return [
        "fit", "--config", recipe, "--model.student", checkpoint, "--run_dir", "run", "--trainer.max_steps", "2",
        "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu", "--data.prompts_per_step", "2",
        "--data.val.0.source.limit", "2", "--data.val.0.max_new_tokens", "8", "--model.validate_at_start", "false",
        "--model.sampler.max_new_tokens", "16", "--model.optimizer.lr", "1e-2", *more,
    ]  # fmt: skip


def changed(checkpoint: str) -> bool:
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, "run/student"))
    return any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("recipe", ["gsm8k", "knights_and_knaves"])
def test_the_recipe_runs_with_any_local_checkpoint(recipe: str, checkpoint: str) -> None:
    more = [] if recipe == "gsm8k" else ["--data.val", "null"]
    arguments = few(recipe, checkpoint, *more)
    if recipe != "gsm8k":
        arguments = [a for i, a in enumerate(arguments) if not _about_val(arguments, i)]
        arguments += ["--data.val", "null"]
    assert main(arguments) == 0
    with open("run/metrics.csv") as stream:
        steps = list(csv.DictReader(stream))
    assert [row["step"] for row in steps if row["train/reward"]] == ["1", "2"]
    assert (Path("run/student") / "model.safetensors").exists()


def _about_val(arguments: list[str], i: int) -> bool:
    keys = ("--data.val",)
    return arguments[i].startswith(keys) or (i > 0 and arguments[i - 1].startswith(keys))


def recorded(recipe: str) -> tuple[list[dict[str, object]], dict[str, bool]]:
    """Rows of the recipe's training data, with right and wrong completions in turn, and the label of each text."""
    config, _ = load_yaml(find_config(recipe).read_text(), recipe)
    template = config["data"]["train"]["template"]
    labels: dict[str, bool] = {}
    rows = []
    for i, row in enumerate(_rows(recipe)):
        right, wrong = _answers(recipe, row)
        completions = [f"Attempt {k} at {i}. {right if k % 2 == 0 else wrong}" for k in range(4)]
        labels.update({text: k % 2 == 0 for k, text in enumerate(completions)})
        rows.append({"prompt": template.format(**row), "completions": completions})
    return rows, labels


def _rows(recipe: str) -> list[dict[str, object]]:
    if recipe == "gsm8k":
        return [json.loads(line) for line in (DATA / "gsm8k/train.jsonl").open()][:8]
    return list(Dataset.from_parquet(str(DATA / "knights_and_knaves/3ppl_train.parquet")))[:8]


def _answers(recipe: str, row: dict[str, object]) -> tuple[str, str]:
    if recipe == "gsm8k":
        gold = str(row["answer"]).split("####")[1].strip()
        return rf"So the answer is \boxed{{{gold}}}.", rf"So the answer is \boxed{{{gold}1}}."
    names, roles = list(row["names"]), list(row["solution"])  # type: ignore[call-overload]

    def tell(flip: bool) -> str:
        return ", ".join(
            f"({i}) {name} is a {'knight' if bool(role) != flip else 'knave'}"
            for i, (name, role) in enumerate(zip(names, roles, strict=True), start=1)
        )

    return f"<answer> {tell(False)} </answer>", f"<answer> {tell(True)} </answer>"


@pytest.mark.parametrize("recipe", ["gsm8k", "knights_and_knaves"])
def test_recorded_completions_get_their_labels_as_rewards(recipe: str, checkpoint: str) -> None:
    rows, labels = recorded(recipe)
    Path("recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = few(recipe, checkpoint)
    arguments = [a for i, a in enumerate(arguments) if not _about_val(arguments, i)]
    sampler = {"name": "replay", "path": "recorded.jsonl", "group_size": 4, "max_new_tokens": 512}
    arguments = [
        a
        for i, a in enumerate(arguments)
        if "max_new_tokens" not in a and (i == 0 or "max_new_tokens" not in arguments[i - 1])
    ]
    paths = json.dumps([f"{DATA}/knights_and_knaves/3ppl_train.parquet"])
    source = [] if recipe == "gsm8k" else ["--data.train.path", paths]
    more = ["--data.val", "null", "--data.train.limit", "8", "--model.sampler", json.dumps(sampler), *source]
    report = [{"class_path": "distillkit.reporting.run_report.RunReport", "init_args": {"rollouts_every": 1}}]
    assert main([*arguments, *more, "--trainer.callbacks", json.dumps(report)]) == 0
    with open("run/metrics.csv") as stream:
        rewards = [float(row["train/correct"]) for row in csv.DictReader(stream) if row["train/correct"]]
    assert all(0 < reward < 1 for reward in rewards)
    assert changed(checkpoint)
    seen = [rollout for file in sorted(Path("run/rollouts").glob("*.jsonl")) for rollout in read_rollouts(file)]
    assert len(seen) == 16
    assert all(rollout.correct == labels[rollout.text] for rollout in seen)
