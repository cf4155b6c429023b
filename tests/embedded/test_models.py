"""The models in the package: what they can do, what they learned from, and that the recipes describe them."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import embedded
from distillkit.cli.shipped import find_config
from distillkit.embedded.arithmetic import check_chain, generate, held_out, split_of
from distillkit.embedded.careless import careless_chain, careless_rows


@pytest.mark.parametrize(("name", "least", "most"), [("teacher", 0.95, 1.0), ("student", 0.25, 0.50)])
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
    assert sum(file.stat().st_size for file in files) < 9 * 2**20


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_recipe_describes_the_model(name: str) -> None:
    recipe = yaml.safe_load(find_config(f"embedded_{name}").read_text())["model"]["init_args"]["init"]
    config = json.loads((embedded.resolve(f"embedded:{name}") / "config.json").read_text())
    assert {key: config[key] for key in recipe} == recipe


def test_careless_chains_calculate_well_and_take_sums_first() -> None:
    firsts = Counter(careless_chain("3*2+4*5", random.Random(seed)).split(">")[0] for seed in range(7000))
    expected = {"3*6*5": 4 / 7, "6+4*5": 2 / 7, "3*2+0": 1 / 7}
    assert {first: firsts[first] / 7000 for first in expected} == pytest.approx(expected, abs=0.02)
    assert sum(firsts.values()) == sum(firsts[first] for first in expected)


def test_careless_rows_are_the_training_problems_with_other_chains() -> None:
    rows, plain = careless_rows(2000), generate("train", 2000)
    assert [(r["prompt"], r["answer"]) for r in rows] == [(r["prompt"], r["answer"]) for r in plain]
    checks = [check_chain(row["prompt"], row["chain"]) for row in rows]
    assert all(check.complete and all(step.right for step in check.steps) for check in checks)
    assert 0.2 < sum(check.legal for check in checks) / len(checks) < 0.6
    written = {e for row in rows for e in (row["prompt"][:-1], *row["chain"].split(">"))}
    assert {split_of(e) for e in written} <= {"train"}
