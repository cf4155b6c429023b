"""The recipes of the papers: each builds through the real command line, with the numbers that are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.lightning import DistillCLI
from distillkit.cli.shipped import recipes
from distillkit.data import PromptData
from distillkit.divergences.sampled import K2, K3
from distillkit.maskers.group_level import GroupLevel
from distillkit.maskers.response_level import ResponseLevel
from distillkit.objectives.trrd import TRRD
from distillkit.teachers.local import LocalTeacher
from distillkit.training.base import StudentModule
from distillkit.training.on_policy import OnPolicyDistillation

PAPERS = [name for name in recipes() if name.startswith("papers/")]


class Constructed(DistillCLI):
    """The command line up to the module and the data: constructors read no file and load no model."""

    built: list[DistillCLI]

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.built.append(self)
        raise StopIteration


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def construct(recipe: str) -> DistillCLI:
        monkeypatch.setattr(Constructed, "built", [], raising=False)
        with pytest.raises(StopIteration):
            Constructed(["fit", "--config", recipe], model_class=OnPolicyDistillation, data_class=PromptData)
        return Constructed.built[0]

    return construct


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_papers_recipe_says_what_it_is_and_its_parts_work_together(recipe: str, build: Any) -> None:
    header = recipes()[recipe].read_text().split("seed_everything")[0]
    for said in ("https://arxiv.org/abs/", "UNVERIFIED", "Memory: ", f"#   distillkit fit --config {recipe}\n"):
        assert said in header, said
    cli = build(recipe)
    assert isinstance(cli.model, StudentModule)
    assert cli.model.student.count("/") == 1, "a hub name"
    assert cli.recipe.name == recipe.replace("/", "-")


def test_every_baseline_and_variant_of_the_papers_is_there() -> None:
    assert [name.removeprefix("papers/") for name in PAPERS] == [
        "kdrl/grpo",
        "kdrl/kd_rkl",
        "kdrl/kdrl",
        "kdrl/kdrl_annealing",
        "kdrl/kdrl_group_mask",
        "kdrl/kdrl_k3",
        "kdrl/kdrl_response_mask",
        "kdrl/kdrl_topk",
        "kdrl/reward_shaping",
        "kdrl/sft",
        "kdrl/zero_rl",
        "rlad/alpha_ablation",
        "rlad/logic_0_6b",
        "rlad/logic_0_6b_grpo",
        "rlad/logic_0_6b_kdrl",
        "rlad/logic_1_7b",
        "rlad/math_1_5b_distill",
        "rlad/math_1_7b",
        "rlad/math_1_7b_base",
        "rlad/math_8b_base",
        "rlkd/gsrm",
        "rlkd/rlkd",
        "rlkd/rlkd_zero",
    ]


KDRL = {
    "kdrl": (K2, None, [2e-3] * 5),
    "kdrl_annealing": (K2, None, [5e-3, 4.95e-3, 1.05e-3, 1e-3, 1e-3]),
    "kdrl_response_mask": (K2, ResponseLevel, [2e-3] * 5),
    "kdrl_group_mask": (K2, GroupLevel, [2e-3] * 5),
    "kdrl_k3": (K3, None, [2e-3] * 5),
}


@pytest.mark.parametrize("name", KDRL)
def test_kdrl_has_the_published_numbers(name: str, build: Any) -> None:
    divergence, masker, betas = KDRL[name]
    module = build(f"papers/kdrl/{name}").model
    parts = module.parts
    assert module.student == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert isinstance(parts.teacher, LocalTeacher) and parts.teacher.path == "Skywork/Skywork-OR1-Math-7B"
    assert isinstance(parts.divergence, divergence)
    assert parts.masker is None if masker is None else isinstance(parts.masker, masker)
    assert [parts.beta.value(step, {}) for step in (0, 1, 79, 80, 81)] == pytest.approx(betas)
    assert module.settings.distill_through == "loss" and parts.reference is None


RLAD = (
    "alpha_ablation",
    "logic_0_6b",
    "logic_1_7b",
    "math_1_5b_distill",
    "math_1_7b",
    "math_1_7b_base",
    "math_8b_base",
)


@pytest.mark.parametrize("name", RLAD)
def test_rlad_has_the_published_numbers(name: str, build: Any) -> None:
    cli = build(f"papers/rlad/{name}")
    objective = cli.model.parts.objective
    assert isinstance(objective, TRRD)
    assert (objective.alpha, objective.clamp, objective.clip_low, objective.clip_high) == (0.5, 1.0, 0.2, 0.28)
    assert (objective.aggregation, objective.correction, objective.eps) == ("sequence", 0, 0.0)
    assert cli.model.parts.divergence is None and cli.model.sampler.group_size == 8
    assert cli.canonical["model"]["optimizer"]["init_args"]["lr"] == 1e-6


def test_the_baselines_of_rlad_differ_from_it_in_the_objective_alone(build: Any) -> None:
    rlad, grpo, kdrl = (build(f"papers/rlad/logic_0_6b{end}") for end in ("", "_grpo", "_kdrl"))
    ours = rlad.model.parts.objective
    for other in (grpo, kdrl):
        assert other.canonical["data"] == rlad.canonical["data"]
        assert other.canonical["model"]["sampler"] == rlad.canonical["model"]["sampler"]
        theirs = other.model.parts.objective
        for name in ("aggregation", "clip_low", "clip_high", "correction", "eps"):
            assert getattr(theirs, name) == getattr(ours, name)
    assert grpo.model.parts.teacher is None and grpo.model.parts.divergence is None
    assert isinstance(kdrl.model.parts.divergence, K2) and kdrl.model.parts.beta.value(0, {}) == 2e-3


@pytest.mark.parametrize("name", ["rlkd", "rlkd_zero"])
def test_rlkd_has_the_numbers_of_the_released_code(name: str, build: Any) -> None:
    cli = build(f"papers/rlkd/{name}")
    parts, settings = cli.model.parts, cli.model.settings
    assert [reward.weight for reward in parts.rewards] == [15.0, 10.0, 15.0]
    assert parts.rewards[2].normalize == "none" and parts.rewards[2].coverage_weight == 0.0
    new = 4096 if name == "rlkd" else 3072
    assert (parts.sampler.group_size, parts.sampler.temperature, parts.sampler.max_new_tokens) == (4, 0.7, new)
    assert isinstance(parts.reference_divergence, K3) and parts.reference_beta.value(0, {}) == 0.04
    assert (settings.max_grad_norm, parts.objective.eps, settings.distil_temperature) == (0.2, 1e-4, 0.7)
    form = parts.rewards[1]
    assert [form.matches(t) for t in ("<think>a</think> 4", "a</think>\n4", "a", "a</think>b</think>c")] == [
        True,
        True,
        False,
        False,
    ]


POSITIONS = {"rlkd": 131_072, "rlkd_zero": 4_096}
"""What the students declare: DeepSeek-R1-Distill-Qwen-7B, Qwen2.5-Math-7B."""


@pytest.mark.parametrize("name", POSITIONS)
def test_rlkds_sequences_fit_the_positions_of_their_students(name: str, build: Any) -> None:
    cli = build(f"papers/rlkd/{name}")
    new = cli.model.parts.sampler.max_new_tokens
    answers = [eval_set.max_new_tokens or new for eval_set in cli.datamodule.val]
    assert cli.datamodule.max_prompt_tokens + max(new, *answers) <= POSITIONS[name]
    assert answers == ([32_768] * 2 if name == "rlkd" else [new] * 2)
