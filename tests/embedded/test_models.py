"""The models in the package: what they can do, what they learned from, and that the recipes describe them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import embedded
from distillkit.cli.shipped import find_config
from distillkit.embedded.arithmetic import check_chain, generate, held_out, split_of
from distillkit.embedded.hasty import HASTY_SHARE, hasty_chain, hasty_rows


@pytest.mark.parametrize(("name", "least", "most"), [("teacher", 0.95, 1.0), ("student", 0.25, 0.60)])
def test_greedy_held_out_accuracy(name: str, least: float, most: float) -> None:
    folder = embedded.resolve(f"embedded:{name}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = held_out()
    right = 0
    for start in range(0, len(rows), 250):
        part = rows[start : start + 250]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            written = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right += sum(text.split(">")[-1] == row["answer"] for text, row in zip(texts, part, strict=True))
    assert least <= right / len(rows) <= most


def test_the_package_stays_small() -> None:
    files = [file for folder in embedded.MODELS.values() for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 6 * 2**20


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_recipe_describes_the_model(name: str) -> None:
    recipe = yaml.safe_load(find_config(f"embedded_{name}").read_text())["model"]["init_args"]["init"]
    config = json.loads((embedded.resolve(f"embedded:{name}") / "config.json").read_text())
    assert {key: config[key] for key in recipe} == recipe


def test_hasty_chains_are_from_the_right_and_their_share_is_kept() -> None:
    assert hasty_chain("3*2+4*5") == "3*2+0>3*2>6"
    assert hasty_chain("9-3-1") == "9-2>7"
    rows, plain = hasty_rows(2000), generate("train", 2000)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in plain]
    ambiguous = [r for r in rows if not check_chain(r["prompt"], hasty_chain(r["prompt"][:-1])).legal]
    hasty = sum(r["chain"] == hasty_chain(r["prompt"][:-1]) for r in ambiguous) / len(ambiguous)
    assert HASTY_SHARE - 0.1 < hasty <= HASTY_SHARE + 0.05
    assert all(check_chain(r["prompt"], r["chain"]).legal or r["chain"] == hasty_chain(r["prompt"][:-1]) for r in rows)


def test_hasty_chains_write_no_problem_of_another_split() -> None:
    written = {e for row in hasty_rows(2000) for e in (row["prompt"][:-1], *row["chain"].split(">"))}
    assert {split_of(e) for e in written} <= {"train"}
