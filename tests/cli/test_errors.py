"""Everything a user can get wrong in a config, and the whole of what is printed about it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from distillkit.cli import main as command
from tests.cli.stand_ins import CLI

DIVERGENCES = "forward_kl, jsd, k1, k2, k3, power, reverse_kl, skew_forward_kl, skew_reverse_kl, todi, topk"


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(arguments: list[str]) -> int:
        CLI(arguments)
        return 0

    monkeypatch.setitem(command._COMMANDS, "fit", train)


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """What a failing command writes to stderr; it writes nothing else, and leaves no run folder."""
    assert command.main(argv) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert out == ""
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
    return err


def write(text: str, name: str = "recipe.yaml") -> str:
    Path(name).write_text(text)
    return name


ONE_PROBLEM = [
    (
        "model:\n  student: x\n  divergence: topkk\n",
        "recipe.yaml, line 3, model.divergence: unknown divergence 'topkk'\n"
        "    got:      'topkk'\n"
        f"    expected: {DIVERGENCES}\n"
        "    try:      topk\n",
    ),
    (
        "model:\n  student: x\n  rewards:\n    - answer\n    - k2\n",
        "recipe.yaml, line 5, model.rewards[1]: 'k2' is a divergence, not a reward\n"
        "    got:      'k2'\n"
        "    expected: answer, format, gsrm, knights_and_knaves, length, math_verify\n",
    ),
    (
        "model:\n  student: x\n  divergence: distillkit.betas.constant.Constant\n",
        "recipe.yaml, line 3, model.divergence: distillkit.betas.constant.Constant is a beta, not a divergence\n"
        "    got:      distillkit.betas.constant.Constant\n"
        "    expected: a subclass of distillkit.components.DivergenceEstimator\n",
    ),
    (
        "model:\n  student: x\n  divergence: collections.OrderedDict\n",
        "recipe.yaml, line 3, model.divergence: collections.OrderedDict is not a divergence\n"
        "    got:      collections.OrderedDict\n"
        "    expected: a subclass of distillkit.components.DivergenceEstimator\n",
    ),
    (
        "model:\n  student: x\n  divergence: tests.cli.stand_ins.any_columns\n",
        "recipe.yaml, line 3, model.divergence: tests.cli.stand_ins.any_columns is not a divergence class\n"
        "    got:      a function\n"
        "    expected: a subclass of DivergenceEstimator\n",
    ),
    (
        "model:\n  student: x\n  divergence: nowhere.Skew\n",
        "recipe.yaml, line 3, model.divergence: cannot import nowhere.Skew\n"
        "    got:      ModuleNotFoundError: No module named 'nowhere'\n"
        "    expected: package.module.Class\n"
        f"    try:      the name of one that is known: {DIVERGENCES}\n",
    ),
    (
        "model:\n  student: x\n  teacher:\n    name: cached\n    dir: d\n    teacher: locl\n",
        "recipe.yaml, line 6, model.teacher.teacher: unknown teacher 'locl'\n"
        "    got:      'locl'\n"
        "    expected: adapter_off, cached, extrapolated, local, mixture, vllm\n"
        "    try:      local\n",
    ),
    (
        "model:\n  student: x\n  divergence: {k: 5}\n",
        "recipe.yaml, line 3, model.divergence: which divergence? neither name nor class_path is given\n"
        "    got:      k\n"
        f"    expected: name: one of {DIVERGENCES}\n",
    ),
    (
        "model:\n  student: x\n  divergence: [k2]\n",
        "recipe.yaml, line 3, model.divergence: not a divergence\n"
        "    got:      ['k2'], a list\n"
        f"    expected: a name, or a mapping with the name of one: {DIVERGENCES}\n",
    ),
    (
        "model:\n  student: x\n  beta: true\n",
        "recipe.yaml, line 3, model.beta: not a beta\n"
        "    got:      True, a bool\n"
        "    expected: a number, a name, or a mapping with the name of one: adaptive_kl, constant, cosine, linear, "
        "reward_progress, switch\n",
    ),
    (
        "model:\n  student: x\n  beta:\n    name: linear\n    start: 1\n    end: fast\n    steps: 3\n",
        "recipe.yaml, line 6, model.beta.end: not what Linear takes\n    got:      'fast'\n    expected: float\n",
    ),
    (
        "model:\n  student: x\n  beta: {name: cosine, start: 1, end: 2}\n",
        "recipe.yaml, line 3, model.beta: Cosine misses the argument 'steps'\n    expected: steps: int\n",
    ),
    (
        "model:\n  student: x\n  beta:\n    name: linear\n    start: 1\n    end: 2\n    steps: 3\n    stop: 4\n",
        "recipe.yaml, line 8, model.beta.stop: Linear has no argument 'stop'\n"
        "    got:      stop\n"
        "    expected: start, end, steps, delta\n"
        "    try:      steps\n",
    ),
    (
        "model:\n  student: x\n  beta:\n    name: switch\n    before: 1\n    after: 0\n    at: -3\n",
        "recipe.yaml, line 7, model.beta.at\n    got:      -3\n"
        "    expected: a finite number of rollout steps, at least 0\n",
    ),
    (
        "model:\n  student: x\n  schedules:\n    objective.clip_low: {name: cosine, start: .nan, end: 1, steps: 2}\n",
        "recipe.yaml, line 4, model.schedules.objective.clip_low.start\n"
        "    got:      nan\n    expected: a finite number\n",
    ),
    (
        "model:\n  student: x\n  schedules:\n    policy_weight: {name: linear, start: 1, end: 0}\n",
        "recipe.yaml, line 4, model.schedules.policy_weight: Linear: a line needs its length or its slope\n"
        "    got:      neither steps nor delta\n    expected: one of steps and delta\n    try:      steps: 80\n",
    ),
    (
        "model:\n  student: x\n  schedules:\n    policy_weight: {name: adaptive_kl, start: 20, target: 1}\n",
        "recipe.yaml, line 4, model.schedules.policy_weight.start\n"
        "    got:      20.0\n    expected: between min (0.0001) and max (10.0)\n",
    ),
    (
        "model:\n  student: x\n  beta: .inf\n",
        "recipe.yaml, line 3, model.beta.value\n    got:      inf\n    expected: a finite number\n",
    ),
    (
        "model:\n  student: x\n  rewards: [{class_path: tests.cli.stand_ins.length_penalty, scael: 2}]\n",
        "recipe.yaml, line 3, model.rewards[0].scael: the function tests.cli.stand_ins.length_penalty has no argument "
        "'scael'\n"
        "    got:      scael\n"
        "    expected: correct_above, kwargs, weight, completions, scale\n"
        "    try:      scale\n",
    ),
    (
        "model:\n  student: x\n  inner_epoch: 2\n",
        "recipe.yaml, line 3, model.inner_epoch: Module has no argument 'inner_epoch'\n"
        "    got:      inner_epoch\n"
        "    expected: student, sampler, teacher, rewards, divergence, beta, masker, objective, schedules, "
        "inner_epochs, crash, optimizer, lr_scheduler\n"
        "    try:      inner_epochs\n",
    ),
    (
        "model:\n  student: x\n  inner_epochs: many\n",
        "recipe.yaml, line 3, model.inner_epochs: not what Module takes\n    got:      'many'\n    expected: int\n",
    ),
    (
        "model:\n  inner_epochs: 1\n",
        "recipe.yaml, line 1, model: Module misses the argument 'student'\n    expected: student: str\n",
    ),
    (
        "model:\n  student: x\n  optimizer: {class_path: torch.optim.AdamW, lerning_rate: 1}\n",
        "recipe.yaml, line 3, model.optimizer.lerning_rate: AdamW has no argument 'lerning_rate'\n"
        "    got:      lerning_rate\n"
        "    expected: lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused\n",
    ),
    (
        "model:\n  student: x\n  optimizer: {class_path: torch.optim.AdamW, lr: fast}\n",
        "recipe.yaml, line 3, model.optimizer.lr: not what AdamW takes\n"
        "    got:      'fast'\n"
        "    expected: float or Tensor\n",
    ),
    (
        "model:\n  student: x\n  optimizer: {class_path: torch.optim.AdamV}\n",
        "recipe.yaml, line 3, model.optimizer: cannot import torch.optim.AdamV\n"
        "    got:      ImportError: torch.optim has no 'AdamV'; did you mean 'Adam'?\n"
        "    expected: package.module.Class\n",
    ),
    (
        "model: {student: x}\ndata:\n  train:\n    path: p\n    limitt: 3\n",
        "recipe.yaml, line 5, data.train.limitt: Source has no argument 'limitt'\n"
        "    got:      limitt\n"
        "    expected: path, limit\n"
        "    try:      limit\n",
    ),
    (
        "model: {student: x}\ndata:\n  val:\n    - {path: p}\n    - {path: [1]}\n",
        "recipe.yaml, line 5, data.val[1].path: not what Source takes: Expected a <class 'str'>. Got value: [1]\n"
        "    got:      [1]\n"
        "    expected: str\n",
    ),
    (
        "model: {student: x}\ndata:\n  row: 3\n",
        "recipe.yaml, line 3, data.row: Data has no argument 'row'\n"
        "    got:      row\n"
        "    expected: train, val, rows\n"
        "    try:      rows\n",
    ),
    (
        "model: {student: x}\noptimizer: AdamW\n",
        "recipe.yaml, line 2, optimizer: no such key 'optimizer'\n"
        "    got:      optimizer\n"
        "    expected: seed_everything, run_dir, model, data, trainer, ckpt_path, weights_only\n"
        "    try:      model.optimizer\n",
    ),
    (
        "modle: {student: x}\nmodel: {student: x}\n",
        "recipe.yaml, line 1, modle: no such key 'modle'\n"
        "    got:      modle\n"
        "    expected: seed_everything, run_dir, model, data, trainer, ckpt_path, weights_only\n"
        "    try:      model\n",
    ),
    (
        "model: 3\n",
        "recipe.yaml, line 1, model: model is not a mapping\n    got:      3\n    expected: argument: value lines\n",
    ),
    (
        "model: {class_path: nowhere.Module}\n",
        "recipe.yaml, line 1, model.class_path: cannot import nowhere.Module\n"
        "    got:      ModuleNotFoundError: No module named 'nowhere'\n"
        "    expected: package.module.Class, a LightningModule\n",
    ),
    (
        "model: {student: x}\ndata: {class_path: tests.cli.stand_ins.Module}\n",
        "recipe.yaml, line 2, data.class_path: tests.cli.stand_ins.Module is not a LightningDataModule\n"
        "    got:      'tests.cli.stand_ins.Module'\n"
        "    expected: package.module.Class, a LightningDataModule\n",
    ),
    (
        "model: {student: x}\nrun_dir: 3\n",
        "recipe.yaml, line 2, run_dir: not what distillkit takes\n    got:      3\n    expected: str or null\n",
    ),
    (
        "model: {student: x}\nseed_everything: maybe\n",
        "recipe.yaml, line 2, seed_everything: not what distillkit takes\n"
        "    got:      'maybe'\n"
        "    expected: bool or int\n",
    ),
]


@pytest.mark.parametrize(("config", "text"), ONE_PROBLEM, ids=[text.split(": ")[1][:40] for _, text in ONE_PROBLEM])
def test_one_problem(capsys: pytest.CaptureFixture[str], config: str, text: str) -> None:
    assert printed(capsys, "fit", "--config", write(config), "--trainer.max_steps", "1") == f"ConfigError: {text}"


TRAINER = [
    (
        "max_steps: 1\n  gradient_clip_val: 0.5\n",
        3,
        "gradient_clip_val: distillkit clips the gradient itself\n"
        "    got:      0.5\n"
        "    try:      model.max_grad_norm: 0.5\n",
    ),
    (
        "max_steps: 1\n  accumulate_grad_batches: 4\n",
        3,
        "accumulate_grad_batches: an update is split by tokens, not by batches\n"
        "    got:      4\n"
        "    expected: 1\n"
        "    try:      model.tokens_per_micro_batch for memory, model.minibatches for updates per step\n",
    ),
    (
        "max_steps: 1\n  max_epochs: 3\n",
        3,
        "max_epochs: distillkit counts rollout steps, not epochs\n"
        "    got:      3\n"
        "    try:      trainer.max_steps: the number of rollout steps\n",
    ),
    (
        "accelerator: cpu\n",
        1,
        "max_steps: how long to train is not said\n"
        "    expected: a number of steps\n"
        "    try:      trainer.max_steps: 100\n",
    ),
    (
        "max_steps: 1\n  acelerator: cpu\n",
        3,
        "acelerator: Trainer has no argument 'acelerator'\n    got:      acelerator\n    try:      accelerator\n",
    ),
    (
        "max_steps: 1\n  precision: half\n",
        3,
        None,
    ),
]


@pytest.mark.parametrize(("trainer", "line", "text"), TRAINER)
def test_trainer_settings(capsys: pytest.CaptureFixture[str], trainer: str, line: int, text: str | None) -> None:
    config = write(f"trainer:\n  {trainer}model: {{student: x}}\n")
    got = printed(capsys, "fit", "--config", config)
    if text is None:
        assert got.startswith(
            "ConfigError: recipe.yaml, line 3, trainer.precision: not what Trainer takes\n    got:      'half'\n"
        )
    else:
        assert got == f"ConfigError: recipe.yaml, line {line}, trainer.{text}"


def test_every_problem_is_printed_at_once_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = write(
        "model:\n"
        "  student: x\n"
        "  divergence: topkk\n"
        "  rewards: [k2, {name: answer, weight: heavy}]\n"
        "  objective:\n"
        "    name: grpo\n"
        "    clip_hihg: 0.3\n"
        "trainer: {max_steps: 1}\n"
        "sed_everything: 3\n"
    )
    text = printed(capsys, "fit", "--config", config, "--model.masker", "response_levle")
    assert text.startswith("ConfigError: 6 problems in the config\n\n")
    assert [paragraph.split("\n")[0] for paragraph in text.strip().split("\n\n")[1:]] == [
        "recipe.yaml, line 9, sed_everything: no such key 'sed_everything'",
        "recipe.yaml, line 3, model.divergence: unknown divergence 'topkk'",
        "recipe.yaml, line 4, model.rewards[0]: 'k2' is a divergence, not a reward",
        "recipe.yaml, line 4, model.rewards[1].weight: not what AnswerReward takes",
        "recipe.yaml, line 7, model.objective.clip_hihg: GRPO has no argument 'clip_hihg'",
        "command line, model.masker: unknown masker 'response_levle'",
    ]


ARGV = [
    (
        ["recipe.yaml"],
        "command line: an argument that belongs to no option\n"
        "    got:      'recipe.yaml'\n"
        "    expected: --key value, such as --trainer.max_steps 100\n"
        "    try:      --config recipe.yaml\n",
    ),
    (
        ["--model.student", "--trainer.max_steps", "1"],
        "command line: --model.student has no value\n    expected: --model.student VALUE\n",
    ),
    (["-x", "1"], "command line: unknown option\n    got:      -x\n    expected: --key value\n"),
    (
        ["--model.divergence", "topkk"],
        "command line, model.divergence: unknown divergence 'topkk'\n"
        "    got:      'topkk'\n"
        f"    expected: {DIVERGENCES}\n"
        "    try:      topk\n",
    ),
    (
        ["--model.rewards", "[answer]", "--model.rewards.4.weight", "1"],
        "command line, model.rewards[4]: no such entry\n"
        "    got:      index 4\n"
        "    expected: 0 to 0, or --model.rewards+ to append\n",
    ),
    (
        ["--model.sampler.group_size", "4"],
        "command line, model.sampler: which sampler? neither name nor class_path is given\n"
        "    got:      group_size\n"
        "    expected: name: one of hf, mixed, replay, vllm\n",
    ),
    (
        ["--config", "nowhere.yaml"],
        "--config: no file nowhere.yaml\n"
        "    got:      {here}/nowhere.yaml\n"
        "    expected: a YAML file, or one of the recipes {recipes}\n"
        "    try:      distillkit configs, which lists the recipes\n",
    ),
    (
        ["--config", "."],
        "--config: . is a folder\n"
        "    expected: a YAML file, or one of the recipes {recipes}\n"
        "    try:      distillkit configs, which lists the recipes\n",
    ),
]


@pytest.mark.parametrize(("argv", "text"), ARGV)
def test_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], text: str
) -> None:
    from distillkit.cli.shipped import recipes

    own = [name for name in recipes() if "/" not in name]
    folders = Counter(name.rpartition("/")[0] for name in recipes() if "/" in name)
    listed = ", ".join([*own, *(f"{folder}/... ({count})" for folder, count in folders.items())])
    filled = text.replace("{here}", str(Path.cwd())).replace("{recipes}", listed)
    more = [] if argv[0].endswith("yaml") else ["--model.student=x", "--trainer.max_steps=1"]
    assert printed(capsys, "fit", *argv, *more) == f"ConfigError: {filled}"


FILES = [
    (
        "model:\n  student: [x\ntrainer: 1\n",
        "recipe.yaml, line 3, column 8: not valid YAML\n"
        "    got:      while parsing a flow sequence: expected ',' or ']', but got ':'\n"
        "    expected: key: value lines, indented with spaces\n",
    ),
    (
        "model:\n\tstudent: x\n",
        "recipe.yaml, line 2, column 1: not valid YAML\n"
        "    got:      while scanning for the next token: found character '\\t' that cannot start any token\n"
        "    expected: key: value lines, indented with spaces\n",
    ),
    (
        "model:\n  student: x\n  beta: 1\n  student: y\n",
        "recipe.yaml, line 4, model.student: the key stands there twice\n"
        "    got:      also in line 2\n"
        "    expected: each key once\n",
    ),
    (
        "",
        "recipe.yaml: not a config\n"
        "    got:      an empty file\n"
        "    expected: a mapping with keys such as model, data and trainer\n",
    ),
    (
        "- model\n",
        "recipe.yaml: not a config\n"
        "    got:      a list\n"
        "    expected: a mapping with keys such as model, data and trainer\n",
    ),
]


@pytest.mark.parametrize(("config", "text"), FILES)
def test_config_files(capsys: pytest.CaptureFixture[str], config: str, text: str) -> None:
    assert printed(capsys, "fit", "--config", write(config)) == f"ConfigError: {text}"


def test_a_config_file_that_is_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_bytes(b"model: \xff\xfe")
    assert printed(capsys, "fit", "--config", "recipe.yaml") == (
        "ConfigError: recipe.yaml: cannot be read\n"
        "    got:      'utf-8' codec can't decode byte 0xff in position 7: invalid start byte\n"
        "    expected: a UTF-8 text file\n"
    )


def test_a_near_recipe_name_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "fit", "--config", "gsm8")
    assert text.startswith("ConfigError: --config: no file and no recipe 'gsm8'\n    got:      'gsm8'\n")
    assert text.endswith("    try:      --config gsm8k\n")


@pytest.mark.parametrize("crash", ["constructor", "data"])
def test_input_that_a_constructor_or_the_data_refuses_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], crash: str
) -> None:
    text = {"constructor": "ConfigError: model.crash: refused by the constructor\n"}
    text |= {"data": "DataError: data.train.path: no such file\n"}
    assert command.main(["fit", "--model.student=x", f"--model.crash={crash}", "--trainer.max_steps=1"]) == 2
    assert capsys.readouterr().err.endswith(text[crash])
    assert list(Path("runs").iterdir()) == []


def test_an_unexpected_error_is_one_line_and_keeps_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", "--model.student=x", "--model.crash=step", "--trainer.max_steps=4", "--trainer.accelerator=cpu"]
    assert command.main(argv) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.endswith("RuntimeError: something broke\nrun again with --debug to see where\n")
    assert Path("runs/run/checkpoints/last.ckpt").is_file()


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fit", "--debug", "--config", "nowhere.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "distillkit.errors.ConfigError: --config: no file nowhere.yaml" in err
