"""Short names: every form means the same in a file and on the command line, and what is saved is canonical."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.cli.shortnames import expand
from distillkit.errors import ConfigError
from distillkit.registry import import_object
from tests.cli.stand_ins import Parsed

SAMPLED = "distillkit.divergences.sampled"
TOPK = "distillkit.divergences.topk.TopK"
STAND_INS = "tests.cli.stand_ins"


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def whole(class_path: str, **given: Any) -> dict[str, Any]:
    """The canonical form, with every default of the class's own constructor."""
    parameters = inspect.signature(import_object(class_path)).parameters.values()
    init_args = {p.name: given.get(p.name, p.default) for p in parameters}
    assert given.keys() <= init_args.keys()
    return {"class_path": class_path, "init_args": init_args} if init_args else {"class_path": class_path}


def topk(**given: Any) -> dict[str, Any]:
    return whole(TOPK, **given)


def constant(value: float) -> dict[str, Any]:
    return whole("distillkit.betas.constant.Constant", value=value)


def function(path: str, **given: Any) -> dict[str, Any]:
    return whole("distillkit.rewards.function.FunctionReward", function=f"{STAND_INS}.{path}", **given)


CASES: list[tuple[str, list[str], str, Any]] = [
    ("divergence: k2", ["--model.divergence", "k2"], "divergence", whole(f"{SAMPLED}.K2")),
    ("divergence: {name: topk, k: 5}", ["--model.divergence", "{name: topk, k: 5}"], "divergence", topk(k=5)),
    (
        "divergence: {name: topk, init_args: {k: 5}}",
        ["--model.divergence=topk", "--model.divergence.k=5"],
        "divergence",
        topk(k=5),
    ),
    (f"divergence: {TOPK}", ["--model.divergence", TOPK], "divergence", topk()),
    (
        f"divergence: {{class_path: {TOPK}, init_args: {{k: 5, tail: false}}}}",
        [
            "--model.divergence.class_path",
            TOPK,
            "--model.divergence.init_args.k",
            "5",
            "--model.divergence.tail=false",
        ],
        "divergence",
        topk(k=5, tail=False),
    ),
    (
        f"divergence: {{class_path: {TOPK}, k: 5}}",
        ["--model.divergence.name=topk", "--model.divergence.k", "5"],
        "divergence",
        topk(k=5),
    ),
    ("divergence: null", ["--model.divergence", "null"], "divergence", None),
    ("beta: 0.02", ["--model.beta", "0.02"], "beta", constant(0.02)),
    ("beta: 1e-3", ["--model.beta", "1e-3"], "beta", constant(0.001)),
    (
        "beta: {name: linear, start: 1, end: 0, steps: 5}",
        ["--model.beta", "linear", "--model.beta.start=1", "--model.beta.end", "0", "--model.beta.steps", "5"],
        "beta",
        whole("distillkit.betas.linear.Linear", start=1.0, end=0.0, steps=5),
    ),
    (
        f"rewards: [{STAND_INS}.any_columns, {{name: format, weight: 0.5}}]",
        ["--model.rewards", f"[{STAND_INS}.any_columns]", "--model.rewards+", "format", "--model.rewards.1.weight=0.5"],
        "rewards.0",
        function("any_columns"),
    ),
    (
        f"rewards: {STAND_INS}.any_columns",
        ["--model.rewards", f"{STAND_INS}.any_columns"],
        "rewards.0",
        function("any_columns"),
    ),
    (
        f"rewards: [{{class_path: {STAND_INS}.length_penalty, weight: 0.5, scale: 3}}]",
        [
            "--model.rewards+",
            f"{{class_path: {STAND_INS}.length_penalty, weight: 0.5}}",
            "--model.rewards.0.scale",
            "3",
        ],
        "rewards.0",
        function("length_penalty", weight=0.5, kwargs={"scale": 3}),
    ),
    (
        f"rewards: [{{class_path: {STAND_INS}.any_columns, weight: 0.5, kwargs: {{a: 1}}}}]",
        ["--model.rewards", f"[{{class_path: {STAND_INS}.any_columns, init_args: {{weight: 0.5, kwargs: {{a: 1}}}}}}]"],
        "rewards.0",
        function("any_columns", weight=0.5, kwargs={"a": 1}),
    ),
    (
        "schedules: {sampler.temperature: 0.7, policy_weight: {name: constant, value: 2}}",
        ["--model.schedules", "{sampler: {temperature: 0.7}, policy_weight: {name: constant, value: 2}}"],
        "schedules",
        {"sampler.temperature": constant(0.7), "policy_weight": constant(2.0)},
    ),
    (
        "teacher: {name: cached, dir: scores, teacher: {name: local, path: big}}",
        [
            "--model.teacher=cached",
            "--model.teacher.dir=scores",
            "--model.teacher.teacher=local",
            "--model.teacher.teacher.path=big",
        ],
        "teacher.init_args.teacher.class_path",
        "distillkit.teachers.local.LocalTeacher",
    ),
    (
        "optimizer: {class_path: torch.optim.SGD, lr: 1e-2}",
        ["--model.optimizer", "SGD", "--model.optimizer.lr", "1e-2"],
        "optimizer.init_args",
        {"lr": 0.01, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
        | {"foreach": None, "differentiable": False, "fused": None},
    ),
    (
        "optimizer: {class_path: tests.cli.stand_ins.Named, name: 7}",
        ["--model.optimizer", "tests.cli.stand_ins.Named", "--model.optimizer.name", "7"],
        "optimizer.init_args.name",
        7,
    ),
    (
        "teacher: {name: local, path: '7', tokens_per_batch: 8}",
        ["--model.teacher=local", "--model.teacher.path=7", "--model.teacher.tokens_per_batch=8"],
        "teacher.init_args.path",
        "7",
    ),
    ("student: '7'", ["--model.student", "7"], "student", "7"),
    ("inner_epochs: 3", ["--model.inner_epochs", "3"], "inner_epochs", 3),
]


EVERY_SLOT = {case[0] for case in CASES if ": null" not in case[0] and "student" not in case[0]}


def at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config[int(key)] if isinstance(config, list) else config[key]
    return config


def ids(case: Any) -> str:
    return str(case[0])[:50]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_short_form_means_the_same_through_both_doors(tmp_path: Path, case: Any) -> None:
    text, argv, path, expected = case
    (tmp_path / "file.yaml").write_text(
        f"model:\n  student: x\n  {text.removeprefix('student: x')}\n".replace("  student: x\n  student", "  student")
    )
    (tmp_path / "bare.yaml").write_text("model: {student: x}\n")
    steps = ["--trainer.max_steps", "1"]
    from_file = Parsed.config("fit", "--config", "file.yaml", *steps)["model"]
    from_argv = Parsed.config("fit", "--config", "bare.yaml", *argv, *steps)["model"]
    assert at(from_file, path) == expected
    assert at(from_argv, path) == expected


def test_the_canonical_config_is_its_own_canonical_form_for_every_command(tmp_path: Path) -> None:
    argv = [argument for case in CASES if case[0] in EVERY_SLOT for argument in case[1]]
    first = Parsed.config("fit", "--model.student", "7", *argv, "--trainer.max_steps", "1")
    assert all(first["model"][key] for key in ("divergence", "beta", "rewards", "schedules", "teacher", "optimizer"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first))
    for command in ("fit", "validate", "test", "predict"):
        assert Parsed.config(command, "--config", "config.yaml") == first


OVERRIDES: list[tuple[str, list[str], str, Any]] = [
    ("divergence: {name: topk, k: 5}", ["--model.divergence.tail", "false"], "divergence", topk(k=5, tail=False)),
    ("divergence: topk", ["--model.divergence.k", "5"], "divergence", topk(k=5)),
    ("divergence: {name: topk, k: 5}", ["--model.divergence", "topk"], "divergence", topk()),
    ("divergence: {name: topk, k: 5}", ["--model.divergence", "k1"], "divergence", whole(f"{SAMPLED}.K1")),
    ("divergence: {name: topk, k: 5}", ["--model.divergence", "{tail: false}"], "divergence", topk(k=5, tail=False)),
    (f"divergence: {{class_path: {TOPK}, init_args: {{k: 5}}}}", ["--model.divergence.k=6"], "divergence", topk(k=6)),
    ("divergence: k2", ["--model.divergence=null"], "divergence", None),
    ("sampler: {name: hf, group_size: 8}", ["--model.sampler.group_size", "4"], "sampler.init_args.group_size", 4),
    ("rewards: [answer, format]", ["--model.rewards.0.weight", "3"], "rewards.0.init_args.weight", 3.0),
    ("rewards: [answer, format]", ["--model.rewards.weight", "3"], "rewards.1.init_args.weight", 3.0),
    (
        "rewards: [answer]",
        ["--model.rewards+=format"],
        "rewards.1.class_path",
        "distillkit.rewards.format.FormatReward",
    ),
    (
        "schedules: {sampler.temperature: {name: linear, start: 1, end: 0, steps: 9}}",
        ["--model.schedules.sampler.temperature.end", "0.5"],
        "schedules",
        {"sampler.temperature": whole("distillkit.betas.linear.Linear", start=1.0, end=0.5, steps=9)},
    ),
    ("optimizer: {class_path: torch.optim.SGD, lr: 1e-2}", ["--model.optimizer.lr=1"], "optimizer.init_args.lr", 1.0),
    ("inner_epochs: 1", ["--model.optimizer.lr", "3e-4"], "optimizer.init_args.lr", 0.0003),
]


@pytest.mark.parametrize("case", OVERRIDES, ids=ids)
def test_the_command_line_changes_what_the_file_says(tmp_path: Path, case: Any) -> None:
    text, argv, path, expected = case
    (tmp_path / "file.yaml").write_text(f"model:\n  student: x\n  {text}\ntrainer: {{max_steps: 1}}\n")
    assert at(Parsed.config("fit", *argv, "--config", "file.yaml")["model"], path) == expected


def test_later_files_win_and_a_mapping_without_a_name_changes_single_arguments(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {student: x, divergence: {name: topk, k: 5}, sampler: {name: hf, group_size: 8, temperature: 0.5}}\n"
        "trainer: {max_steps: 1}\n"
    )
    (tmp_path / "tweak.yaml").write_text("model: {divergence: {tail: false}, sampler: {name: hf, group_size: 2}}\n")
    model = Parsed.config("fit", "--config", "base.yaml", "--config", "tweak.yaml")["model"]
    assert model["divergence"] == topk(k=5, tail=False)
    assert (model["sampler"]["init_args"]["group_size"], model["sampler"]["init_args"]["temperature"]) == (2, 1.0)


def test_a_name_alone_keeps_what_all_parts_of_the_slot_have(tmp_path: Path) -> None:
    sampler = "{name: hf, group_size: 2, temperature: 0.5, rows_per_batch: 64}"
    (tmp_path / "base.yaml").write_text(f"model: {{student: x, sampler: {sampler}}}\ntrainer: {{max_steps: 1}}\n")

    def swapped(name: str) -> dict[str, Any]:
        return Parsed.config("fit", "--config", "base.yaml", "--model.sampler", name)["model"]["sampler"]

    vllm = swapped("vllm")
    assert vllm["class_path"] == "distillkit.samplers.vllm.VLLMSampler"
    assert (vllm["init_args"]["group_size"], vllm["init_args"]["temperature"]) == (2, 0.5)
    assert "rows_per_batch" not in vllm["init_args"]
    assert swapped("hf")["init_args"]["rows_per_batch"] == 256


@pytest.mark.parametrize(
    "argv",
    [["--model.class_path", f"{STAND_INS}.OtherModule"], ["--model", f"{STAND_INS}.OtherModule"]],
)
def test_another_module_is_chosen_by_its_class_path(tmp_path: Path, argv: list[str]) -> None:
    config = Parsed.config("fit", *argv, "--model.width", "5", "--model.rewards", "[answer]", "--trainer.max_steps=1")
    assert config["model"]["class_path"] == f"{STAND_INS}.OtherModule"
    assert config["model"]["init_args"]["width"] == 5
    assert config["model"]["init_args"]["rewards"][0]["class_path"] == "distillkit.rewards.answer.AnswerReward"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert Parsed.config("fit", "--config", "config.yaml") == config
    flat = f"model: {{class_path: {STAND_INS}.OtherModule, width: 5, rewards: [answer]}}\ntrainer: {{max_steps: 1}}\n"
    (tmp_path / "flat.yaml").write_text(flat)
    assert Parsed.config("fit", "--config", "flat.yaml") == config


def test_naming_the_default_module_changes_nothing(tmp_path: Path) -> None:
    plain = Parsed.config("fit", "--model.student=x", "--trainer.max_steps=1")
    named = {"class_path": f"{STAND_INS}.Module", "init_args": {"student": "x"}}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump({"model": named, "trainer": {"max_steps": 1}}))
    assert Parsed.config("fit", "--config", "named.yaml") == plain


def test_expand_is_the_same_function_without_a_command_line() -> None:
    assert expand("divergence", "k2") == part(f"{SAMPLED}.K2")
    assert expand("divergence", {"name": "topk", "k": 5}) == part(TOPK, k=5)
    assert expand("beta", 3) == part("distillkit.betas.constant.Constant", value=3)
    assert expand("teacher", None) is None
    spec = part(TOPK, k=5)
    assert expand("divergence", spec) == spec
    assert expand("divergence", spec) is not spec
    with pytest.raises(ConfigError, match="unknown divergence 'k9'"):
        expand("divergence", "k9")


def test_expanding_leaves_what_it_was_given_as_it_was() -> None:
    spec = {"name": "cached", "dir": "d", "teacher": {"name": "local", "path": "p"}}
    before = yaml.safe_dump(spec)
    expand("teacher", spec)
    assert yaml.safe_dump(spec) == before
