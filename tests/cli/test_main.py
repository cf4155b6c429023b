"""The `distillkit` command itself: help without torch, exit codes, clean words at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path

import pytest

import distillkit
from distillkit.cli import main as command
from distillkit.cli.main import main
from distillkit.errors import ConfigError
from tests.cli.stand_ins import CLI

ROOT = Path(distillkit.__file__).parents[1]


def run(*argv: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "distillkit", *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["components"], ["components", "divergence"], ["configs"]])
def test_help_and_listings_do_not_import_torch(argv: list[str]) -> None:
    code = (
        "import sys; from distillkit.cli.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DISTILLKIT_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in command._COMMANDS if f"  {name} " in out] == list(command._COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distillkit {distillkit.__version__}\n"


def test_an_unknown_command_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti", "--config", "x"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit: no command 'fti'\n"
        "    got:      fti\n"
        "    expected: fit, validate, test, predict, components, configs, rollouts, compare, plot, plan, doctor, "
        "decompose\n"
        "    try:      fit\n"
    )


def test_a_command_without_a_config_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: distillkit fit: of which config?\n"
        "    expected: --config FILE\n"
        "    try:      distillkit fit --config quickstart\n"
    )


def test_what_only_the_parser_refuses_is_handed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ArgumentError(None, "strange")

    monkeypatch.setattr("lightning.pytorch.cli.LightningArgumentParser.parse_args", refuse)
    with pytest.raises(ConfigError) as caught:
        CLI(["fit", "--model.student=x", "--trainer.max_steps=1"])
    assert str(caught.value) == "the config cannot be used\n    got:      strange"


def test_rollouts_goes_to_the_viewer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(command._COMMANDS, "configs", interrupted)
    assert main(["configs"]) == 1
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_closed_pipe_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader = subprocess.Popen(
        [sys.executable, "-m", "distillkit", "components", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.close()
    assert reader.wait(timeout=60) == 1
    assert reader.stderr.read() == ""


def test_the_real_command_refuses_a_bad_recipe_before_any_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model:\n  student: /nowhere/at/all\n  sampler: {name: hf, group_sise: 4}\n  teacher: loca\n"
        "trainer: {max_steps: 1}\n"
    )
    done = run("fit", "--config", "recipe.yaml")
    assert done.returncode == 2
    assert done.stderr.split("\n\n")[0] == "ConfigError: 2 problems in the config"
    assert "recipe.yaml, line 3, model.sampler.group_sise: HFSampler has no argument 'group_sise'\n" in done.stderr
    assert "recipe.yaml, line 4, model.teacher: unknown teacher 'loca'\n" in done.stderr
    assert "nowhere" not in done.stderr
    assert not Path("runs").exists()


def test_print_config_prints_the_canonical_config_of_the_real_module(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(
        "model: {student: x, sampler: hf, teacher: {name: local, path: y}, divergence: k2, beta: 1, objective: grpo}\n"
        "trainer: {max_steps: 1}\n"
    )
    done = run("fit", "--config", "recipe.yaml", "--model.objective=trrd", "--model.divergence=null", "--print_config")
    assert done.returncode == 0, done.stderr
    model = yaml.safe_load(done.stdout)["model"]
    assert model["objective"]["class_path"] == "distillkit.objectives.trrd.TRRD"
    assert model["divergence"] is None
    assert model["sampler"]["init_args"]["group_size"] == 8
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("argv", "first"),
    [
        (["--model.divergence.help"], "KIND        NAME             FROM        CLASS"),
        (["--model.rewards.help"], "KIND    NAME                FROM        CLASS"),
        (["--model.beta.help", "linear"], "linear — "),
        (["--model.beta.help=linear"], "linear — "),
    ],
)
def test_help_of_a_slot_lists_its_parts(capsys: pytest.CaptureFixture[str], argv: list[str], first: str) -> None:
    with pytest.raises(SystemExit) as caught:
        CLI(["fit", *argv])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(first)


def test_help_of_a_command_shows_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        CLI(["fit", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: distillkit [options] fit ")
    assert all(key in out for key in ("--run_dir", "--model.student", "--model.divergence", "--trainer.max_steps"))
