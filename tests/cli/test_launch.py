"""Which folder a run gets: names, refusals, continuing, and the same answer on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.cli.launch import Launch, agree, differences, global_rank, plan
from distillkit.errors import ConfigError
from distillkit.reporting.run_folder import RunFolder, RunState

CONFIG: dict[str, Any] = {"model": {"beta": 1}, "trainer": {"max_steps": 3}}


def start(command: str = "fit", ckpt_path: str | None = None, run_dir: str | None = None, name: str = "q") -> Launch:
    return plan(name, command, run_dir=run_dir, ckpt_path=ckpt_path, config=CONFIG)


def run(name: str, state: RunState | None, *, ckpt: bool = True, config_name: str = "q", command: str = "fit") -> Path:
    """Lay out the folder of an earlier run."""
    folder = RunFolder(Path("runs") / name)
    folder.path.mkdir(parents=True)
    if state is not None:
        folder.begin(config_name, command)
        folder.end(state)
    folder.config_yaml.write_text(yaml.safe_dump(CONFIG))
    if ckpt:
        folder.checkpoints.mkdir()
        folder.last_ckpt.write_text("weights")
    return folder.path


def everything() -> dict[str, str]:
    return {str(p): p.read_text() for p in sorted(Path("runs").rglob("*")) if p.is_file() and p.name != ".lock"}


def test_folders_are_numbered_in_the_order_of_their_runs() -> None:
    assert [start().folder.path.as_posix() for _ in range(3)] == ["runs/q", "runs/q-2", "runs/q-3"]
    Path("runs/q-2").rmdir()
    Path("runs/q").rmdir()
    assert start().folder.path.as_posix() == "runs/q-4"
    assert start(name="q-x").folder.path.as_posix() == "runs/q-x"
    assert start("validate").folder.path.as_posix() == "runs/q-validate"
    assert start("validate").folder.path.as_posix() == "runs/q-validate-2"


def test_a_folder_that_another_process_takes_first_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = Path.mkdir, []

    def raced(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "q" and not taken:
            taken.append(real(self))
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", raced)
    assert start().folder.path.as_posix() == "runs/q-2"


def test_an_explicit_folder_is_used_once() -> None:
    assert start(run_dir="deep/er/mine").folder.path == Path("deep/er/mine")
    with pytest.raises(ConfigError) as caught:
        start(run_dir="deep/er/mine")
    assert str(caught.value) == (
        "run_dir: deep/er/mine exists already\n"
        "    expected: a folder that does not exist\n"
        "    try:      another --run_dir, or leave it out for runs/<config name>-<number>"
    )


def test_an_explicit_folder_with_an_unfinished_run_says_how_to_continue_it() -> None:
    run("q", "stopped")
    with pytest.raises(ConfigError) as caught:
        start(run_dir="runs/q")
    assert str(caught.value) == (
        "run_dir: runs/q exists already\n"
        "    got:      a stopped run of 'q'\n"
        "    expected: a folder that does not exist\n"
        "    try:      another --run_dir, or leave it out for runs/<config name>-<number>; "
        "--ckpt_path last continues this run"
    )


def test_a_file_in_the_place_of_the_folder_is_refused() -> None:
    Path("mine").write_text("precious")
    with pytest.raises(ConfigError, match="run_dir: mine exists already"):
        start(run_dir="mine")
    assert Path("mine").read_text() == "precious"


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_last_continues_the_newest_unfinished_run_of_that_config(state: RunState) -> None:
    run("q", "stopped")
    run("q-9", state)
    run("q-10", state)
    run("q-11", "finished")
    run("q-12", "stopped", config_name="q-12")
    run("q-13", "stopped", command="validate")
    run("q-14", None)
    launch = start(ckpt_path="last")
    assert launch.folder.path.as_posix() == "runs/q-10"
    assert launch.ckpt_path == "runs/q-10/checkpoints/last.ckpt"
    assert launch.continued
    assert launch.notes == ("continuing runs/q-10",)


def test_last_with_nothing_to_continue_says_so_and_starts_anew() -> None:
    run("q", "finished")
    launch = start(ckpt_path="last")
    assert (launch.folder.path.as_posix(), launch.ckpt_path, launch.continued) == ("runs/q-2", None, False)
    assert launch.notes == ("--ckpt_path last: no unfinished run of 'q' in runs; starting anew in runs/q-2",)


@pytest.mark.parametrize(
    ("run_dir", "old", "new"), [(None, "runs/q-2", "runs/q-3"), ("runs/mine", "runs/mine", "runs/mine-2")]
)
def test_a_run_killed_before_its_first_checkpoint_starts_over_and_is_left_as_it_is(
    run_dir: str | None, old: str, new: str
) -> None:
    run("q", "finished")
    run(Path(old).name, "running", ckpt=False)
    before = everything()
    launch = start(ckpt_path="last", run_dir=run_dir)
    assert (launch.folder.path.as_posix(), launch.ckpt_path, launch.continued) == (new, None, False)
    assert launch.notes == (
        f"{old} was stopped before its first checkpoint; starting over in {new} (nothing in {old} is changed)",
    )
    assert everything() == before


def test_last_with_a_folder_continues_that_one() -> None:
    run("q", "stopped")
    run("q-2", "stopped")
    assert start(ckpt_path="last", run_dir="runs/q").folder.path.as_posix() == "runs/q"
    launch = start(ckpt_path="last", run_dir="elsewhere")
    assert launch.folder.path == Path("elsewhere")
    assert launch.notes == ("--ckpt_path last: no folder elsewhere; starting anew in elsewhere",)


@pytest.mark.parametrize(
    ("state", "got", "hint"),
    [
        (
            "finished",
            "a fit run that is finished",
            "another run_dir, with --ckpt_path runs/q/checkpoints/last.ckpt to go on from its weights",
        ),
        (None, "no status.json in it", "another run_dir"),
    ],
)
def test_a_folder_that_cannot_be_continued_is_refused(state: RunState | None, got: str, hint: str) -> None:
    run("q", state)
    with pytest.raises(ConfigError) as caught:
        start(ckpt_path="last", run_dir="runs/q")
    assert str(caught.value) == (
        "--ckpt_path last: runs/q cannot be continued\n"
        f"    got:      {got}\n"
        "    expected: the folder of an unfinished fit\n"
        f"    try:      {hint}"
    )


def test_a_changed_config_is_refused_with_the_difference() -> None:
    run("q", "stopped")
    before = everything()
    config = {"model": {"beta": 2, "extra": True}, "trainer": {"max_steps": 9}}
    with pytest.raises(ConfigError) as caught:
        plan("q", "fit", run_dir=None, ckpt_path="last", config=config)
    assert str(caught.value) == (
        "--ckpt_path last: the config is not the one that runs/q was started with\n"
        "    got:      model.beta: 1 -> 2\n"
        "              model.extra: (absent) -> True\n"
        "    expected: the same config; max_steps, max_time, loggers, devices and the progress bar may change\n"
        "    try:      --config runs/q/recipe.yaml, or leave out --ckpt_path last to start a new run"
    )
    assert everything() == before


def trainer(**settings: Any) -> dict[str, Any]:
    return {"trainer": {"precision": "32-true", "callbacks": None, **settings}}


BAR = {"class_path": "distillkit.reporting.progress.StepProgress", "init_args": {"every_n_steps": 5}}
STOP = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "a", "patience": 3}}
LOGGER = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "x"}}


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        (trainer(max_steps=1), trainer(max_steps=2), []),
        (trainer(logger=None), trainer(logger=[LOGGER]), []),
        (trainer(devices=1, num_nodes=1), trainer(devices=2, num_nodes=2), []),
        (trainer(enable_progress_bar=None), trainer(enable_progress_bar=False), []),
        (trainer(callbacks=None), trainer(callbacks=[BAR]), []),
        (trainer(callbacks=[BAR, STOP]), trainer(callbacks=STOP), []),
        (trainer(callbacks=[]), trainer(callbacks=None), []),
        ({"run_dir": "a", **trainer()}, {"run_dir": None, **trainer()}, []),
        (trainer(), trainer(precision="bf16-mixed"), ["trainer.precision: 32-true -> bf16-mixed"]),
        (
            trainer(callbacks=[STOP]),
            trainer(),
            [
                "trainer.callbacks[0].class_path: lightning.pytorch.callbacks.EarlyStopping -> (absent)",
                "trainer.callbacks[0].monitor: a -> (absent)",
                "trainer.callbacks[0].patience: 3 -> (absent)",
            ],
        ),
        (
            {"model": {"rewards": [{"class_path": "A", "init_args": {"weight": 1.0}}]}},
            {"model": {"rewards": [{"class_path": "B", "init_args": {"weight": 1.0}}]}},
            ["model.rewards[0].class_path: A -> B"],
        ),
        (
            {"model": {"rewards": [1, 2]}},
            {"model": {"rewards": [1]}},
            ["model.rewards[1]: 2 -> (absent)"],
        ),
        ({"model": {"beta": None}}, {"model": {"beta": 0.0}}, ["model.beta: None -> 0.0"]),
        ({"model": {"beta": 1}}, {"model": {"beta": 1.0}}, []),
        ({"trainer": {"max_steps_per": 1}}, {"trainer": {"max_steps_per": 2}}, ["trainer.max_steps_per: 1 -> 2"]),
    ],
)
def test_what_may_change_and_what_may_not(before: dict[str, Any], now: dict[str, Any], changed: list[str]) -> None:
    assert differences(before, now) == changed


def test_evaluation_takes_the_newest_checkpoint_of_that_config_finished_or_not() -> None:
    run("q", "stopped")
    run("q-2", "finished")
    run("q-3", "running", ckpt=False)
    launch = start("validate", ckpt_path="last")
    assert launch.folder.path.as_posix() == "runs/q-validate"
    assert launch.ckpt_path == "runs/q-2/checkpoints/last.ckpt"
    assert launch.notes == ("using the checkpoint of runs/q-2",)
    assert not launch.continued


def test_evaluation_without_a_checkpoint_is_refused_and_leaves_no_folder() -> None:
    with pytest.raises(ConfigError) as caught:
        start("test", ckpt_path="last")
    assert str(caught.value) == (
        "--ckpt_path last: nothing to continue from\n"
        "    got:      no run of 'q' with a checkpoint in runs\n"
        "    try:      distillkit fit first, or --ckpt_path FILE to test a checkpoint"
    )
    assert list(Path("runs").iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"LOCAL_RANK": "1"}, 1),
        ({"LOCAL_RANK": "0", "NODE_RANK": "2"}, 2),
        ({"SLURM_PROCID": "5"}, 5),
    ],
)
def test_the_rank_is_read_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert global_rank() == rank


def decide() -> Launch:
    return start(ckpt_path="last")


def never() -> Launch:
    raise AssertionError("only rank 0 decides")


def test_child_processes_of_lightning_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    run("q", "stopped")
    chosen = agree(decide, run_dir=None, ckpt_path="last")
    monkeypatch.setenv("LOCAL_RANK", "1")
    followed = agree(never, run_dir=None, ckpt_path="last")
    assert followed.folder.path == chosen.folder.path.absolute()
    assert followed.ckpt_path == str(Path("runs/q/checkpoints/last.ckpt").absolute())


def test_rank_0_does_not_follow_a_variable_that_was_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKIT_RUN_DIR", "runs/elsewhere")
    assert agree(decide, run_dir=None, ckpt_path="last").folder.path.as_posix() == "runs/q"


def test_ranks_of_torchrun_agree_through_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    run("q", "stopped")
    monkeypatch.setenv("RANK", "0")
    chosen = agree(decide, run_dir=None, ckpt_path="last")
    monkeypatch.delenv("DISTILLKIT_RUN_DIR")
    monkeypatch.setenv("RANK", "1")
    followed = agree(never, run_dir=None, ckpt_path="last")
    assert (followed.folder.path, followed.ckpt_path) == (chosen.folder.path.absolute(), chosen.ckpt_path)


def refuse() -> Launch:
    raise ConfigError("run_dir: exists already")


def test_tasks_of_slurm_agree_through_a_file_and_stop_when_rank_0_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(key, value)
    chosen = agree(decide, run_dir=None, ckpt_path="last")
    monkeypatch.delenv("DISTILLKIT_RUN_DIR")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert agree(never, run_dir=None, ckpt_path="last").folder.path == chosen.folder.path.absolute()
    assert json.loads(Path("runs/.launch-7-0-0.json").read_text())["ckpt_path"] is None

    monkeypatch.setenv("SLURM_STEP_ID", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(ConfigError, match="run_dir: exists already"):
        agree(refuse, run_dir=None, ckpt_path=None)
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(ConfigError, match="rank 0 refused to start; its message says why"):
        agree(never, run_dir=None, ckpt_path=None)


def test_a_rank_that_cannot_know_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(ConfigError) as caught:
        agree(never, run_dir=None, ckpt_path=None)
    assert str(caught.value) == (
        "run_dir: this process has rank 1, and nothing says which folder rank 0 chose\n"
        "    expected: run_dir, or DISTILLKIT_RUN_DIR in the environment of every process\n"
        "    try:      --run_dir FOLDER"
    )
    assert agree(never, run_dir="mine", ckpt_path=None).folder.path == Path("mine")
