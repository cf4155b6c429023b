"""`docs/from_trl.md`: its code runs, its configs are valid, its tables name what exists."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from distillkit.cli.shortnames import Expansion
from distillkit.cli.yaml_file import dotted
from distillkit.data import PromptData
from distillkit.objectives.grpo import GRPO
from distillkit.rewards.function import FunctionReward
from distillkit.samplers.hf import HFSampler
from distillkit.samplers.vllm import VLLMSampler
from distillkit.samplers.vllm_server import VLLMServerSampler
from distillkit.training.on_policy import OnPolicyDistillation

PAGE = (Path(__file__).parents[2] / "docs/from_trl.md").read_text(encoding="utf-8")
BLOCKS = [(m[1], m[2], m[3]) for m in re.finditer(r"```(\w+)(?: ([\w.]+))?\n(.*?)```", PAGE, re.DOTALL)]
CONFIGS = [text for language, _, text in BLOCKS if language == "yaml"]
NAMED = re.compile(r"`([a-z_][\w.]*)`")
PLACES: dict[str, tuple[Any, ...]] = {
    "model": (OnPolicyDistillation,),
    "model.sampler": (HFSampler, VLLMSampler, VLLMServerSampler),
    "model.objective": (GRPO,),
    "data": (PromptData,),
    "trainer": (Trainer,),
}


def block(name: str | None) -> str:
    [text] = [text for language, title, text in BLOCKS if language == "python" and title == name]
    return text


def rows(heading: str) -> list[list[str]]:
    table = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_rewards.py").write_text(block("my_rewards.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_rewards", None)


def test_every_block_of_the_page_is_tested_here() -> None:
    assert [(language, title) for language, title, _ in BLOCKS] == [
        ("python", "my_rewards.py"),
        ("yaml", "config"),
        ("python", None),
        ("yaml", "config"),
        ("yaml", "config"),
        ("python", "GRPOConfig"),
        ("yaml", "config"),
    ]


@pytest.mark.usefixtures("my_rewards")
def test_the_python_blocks_run() -> None:
    space: dict[str, Any] = {}
    exec(compile(block(None), "from_trl.md", "exec"), space)
    rewards = space["module"].rewards
    assert [type(reward) for reward in rewards] == [FunctionReward, FunctionReward]
    assert [(reward.function, reward.weight) for reward in rewards] == [
        ("my_rewards.correct_answer", 1.0),
        ("my_rewards.brevity", 0.5),
    ]


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_the_configs_are_valid(text: str) -> None:
    config = yaml.safe_load(text)
    for key, target in (("model", OnPolicyDistillation), ("data", PromptData)):
        if key in config:
            expansion = Expansion(dotted)
            expansion.arguments(target, config[key], (key,))
            expansion.raise_problems()
    assert set(config) <= {"model", "data", "trainer", "seed_everything", "run_dir"}
    assert set(config.get("trainer", {})) <= set(inspect.signature(Trainer.__init__).parameters)


@pytest.mark.usefixtures("my_rewards")
def test_functions_in_a_config_become_rewards_with_their_weights() -> None:
    expansion = Expansion(dotted)
    model = expansion.arguments(OnPolicyDistillation, yaml.safe_load(CONFIGS[0])["model"], ("model",))
    assert [reward["class_path"] for reward in model["rewards"]] == [f"{FunctionReward.__module__}.FunctionReward"] * 3
    made = [FunctionReward(**reward["init_args"]) for reward in model["rewards"]]
    for reward in made:
        reward.setup()
    assert [(reward.name, reward.weight) for reward in made] == [
        ("correct_answer", 1.0),
        ("brevity", 0.5),
        ("politeness", 0.1),
    ]


def test_the_keys_in_the_table_exist() -> None:
    keys = {key for row in rows("GRPOConfig") for cell in row[1:] for key in NAMED.findall(cell) if "." in key}
    ours = {key for key in keys if key.split(".")[0] in ("model", "data", "trainer")}
    assert len(ours) > 25
    for key in ours:
        place, _, name = key.rpartition(".")
        assert any(name in inspect.signature(part).parameters for part in PLACES[place]), key
    assert {name for row in rows("GRPOConfig") for name in NAMED.findall(row[1]) if "." not in name} == {
        "seed_everything",
        "run_dir",
        "ckpt_path",
    }


@pytest.mark.filterwarnings("ignore")
def test_every_field_of_grpo_config_is_on_the_page_and_no_other() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: GRPOConfig's own fields cannot be listed")
    from transformers import TrainingArguments

    every = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    mapped = {name for row in rows("GRPOConfig") for name in NAMED.findall(row[0])}
    absent = set(NAMED.findall(PAGE.split("\nNot in distillkit: ")[1].split("\n\n")[0]))
    assert mapped | absent <= every and not mapped & absent
    assert every - inherited <= mapped | absent
    space: dict[str, Any] = {}
    exec(block("GRPOConfig").replace("    seed=1,\n", "    seed=1,\n    use_cpu=True,\n"), space)
    config = space["config"]
    ours = yaml.safe_load(CONFIGS[-1])
    model, objective = ours["model"], ours["model"]["objective"]
    assert config.generation_batch_size == ours["data"]["prompts_per_step"] * config.num_generations
    assert (config.num_generations, config.max_completion_length) == (
        model["sampler"]["group_size"],
        model["sampler"]["max_new_tokens"],
    )
    assert (config.epsilon, config.epsilon_high) == (objective["clip_low"], objective["clip_high"])
    assert (config.loss_type, objective["aggregation"]) == ("dapo", "token")
    assert (config.max_steps, config.seed) == (ours["trainer"]["max_steps"], ours["seed_everything"])
    assert config.learning_rate == model["optimizer"]["init_args"]["lr"]
    assert config.reward_weights == [1.0, model["rewards"][1]["weight"]]
