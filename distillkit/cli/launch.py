"""Which run folder: a new one, or the one that `--ckpt_path last` continues; the same on every rank.

Rank 0 decides. Lightning's own child processes read its decision from `DISTILLKIT_RUN_DIR`, ranks that torchrun started
from its store, SLURM tasks from a file named after the job step.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from distillkit.cli.yaml_file import load_yaml
from distillkit.errors import ConfigError, problem
from distillkit.reporting.files import write_atomically
from distillkit.reporting.run_folder import RunFolder

__all__ = ["RUN_DIR_VARIABLE", "Launch", "agree", "differences", "global_rank", "plan"]

RUN_DIR_VARIABLE = "DISTILLKIT_RUN_DIR"
RUNS = Path("runs")

MAY_CHANGE = (
    "run_dir",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.logger",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.default_root_dir",
)
"""What a continued run may have otherwise than before; progress-bar callbacks may change too."""

_PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Launch:
    """Where a run writes, what it continues from, and what to tell the user about it."""

    folder: RunFolder
    ckpt_path: str | None = None
    continued: bool = False
    notes: tuple[str, ...] = ()


def plan(
    name: str, command: str, *, run_dir: str | None, ckpt_path: str | None, config: Mapping[str, Any], runs: Path = RUNS
) -> Launch:
    """Choose the folder of a run and reserve it (rank 0).

    Args:
        name: of the config.
        command: `fit`, `validate`, `test` or `predict`.
        run_dir: the folder the user asked for.
        ckpt_path: `last`, a file, or None.
        config: the canonical config.
        runs: where folders without a `run_dir` lie.

    Raises:
        ConfigError: the folder exists already, or the run to continue has another config.
    """
    if command != "fit":
        folder = _new(Path(run_dir) if run_dir else None, runs / f"{name}-{command}")
        if ckpt_path != "last":
            return Launch(folder, ckpt_path)
        trained = [run for run in _runs_of(name, runs) if run.last_ckpt.exists()]
        if not trained:
            folder.discard()
            raise ConfigError(
                problem(
                    "--ckpt_path last: nothing to continue from",
                    got=f"no run of {name!r} with a checkpoint in {runs}",
                    hint=f"distillkit fit first, or --ckpt_path FILE to {command} a checkpoint",
                )
            )
        return Launch(folder, str(trained[-1].last_ckpt), notes=(f"using the checkpoint of {trained[-1].path}",))
    if ckpt_path != "last":
        return Launch(_new(Path(run_dir) if run_dir else None, runs / name), ckpt_path)
    return _continue(name, Path(run_dir) if run_dir else None, config, runs)


def _continue(name: str, run_dir: Path | None, config: Mapping[str, Any], runs: Path) -> Launch:
    if run_dir is None:
        unfinished = [run for run in _runs_of(name, runs) if (s := run.status()) is not None and s.state != "finished"]
        found = unfinished[-1] if unfinished else None
        nothing = f"no unfinished run of {name!r} in {runs}"
    else:
        found = RunFolder(run_dir) if run_dir.exists() else None
        nothing = f"no folder {run_dir}"
        status = found.status() if found else None
        if found and (status is None or status.state == "finished" or status.command != "fit"):
            got = "no status.json in it" if status is None else f"a {status.command} run that is {status.state}"
            raise ConfigError(
                problem(
                    f"--ckpt_path last: {run_dir} cannot be continued",
                    got=got,
                    expected="the folder of an unfinished fit",
                    hint="another run_dir"
                    if status is None
                    else f"another run_dir, with --ckpt_path {found.last_ckpt} to go on from its weights",
                )
            )
    if found is None:
        folder = _new(run_dir, runs / name)
        return Launch(folder, notes=(f"--ckpt_path last: {nothing}; starting anew in {folder.path}",))
    found.lock()
    if not found.last_ckpt.exists():
        folder = _new(None, run_dir or runs / name)
        note = f"{found.path} was stopped before its first checkpoint; starting over in {folder.path}"
        return Launch(folder, notes=(f"{note} (nothing in {found.path} is changed)",))
    _refuse_changes(found, config)
    return Launch(found, str(found.last_ckpt), continued=True, notes=(f"continuing {found.path}",))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what changed between two canonical configs and must not when a run is continued.

    Example:
        >>> differences({"model": {"beta": 1}, "run_dir": "a"}, {"model": {"beta": 2}, "run_dir": "b"})
        ['model.beta: 1 -> 2']
    """
    old, new = dict(_leaves(_comparable(before))), dict(_leaves(_comparable(now)))
    changed = [key for key in {**old, **new} if old.get(key, "(absent)") != new.get(key, "(absent)")]
    return [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in changed
        if not any(key == free or key.startswith((f"{free}.", f"{free}[")) for free in MAY_CHANGE)
    ]


def global_rank() -> int:
    """Return this process's rank as its launcher tells it, 0 when none does."""
    for variable in ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if (value := os.environ.get(variable)) is not None:
            return int(value)
    return int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("NODE_RANK", 0))


def agree(decide: Callable[[], Launch], *, run_dir: str | None, ckpt_path: str | None, runs: Path = RUNS) -> Launch:
    """Return rank 0's launch on every rank.

    Raises:
        ConfigError: rank 0 refused, or nothing tells this rank what rank 0 decided.
    """
    share = _torchrun() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else _slurm(runs)
    if global_rank() == 0:
        try:
            launch = decide()
        except BaseException:
            if share:
                share[0](json.dumps({"refused": True}))
            raise
        os.environ[RUN_DIR_VARIABLE] = str(launch.folder.path.absolute())
        if share:
            share[0](json.dumps({"run_dir": str(launch.folder.path.absolute()), "ckpt_path": launch.ckpt_path}))
        return launch
    if share:
        decision = json.loads(share[1]())
        if decision.get("refused"):
            raise ConfigError("rank 0 refused to start; its message says why")
        return Launch(RunFolder(Path(decision["run_dir"])), decision["ckpt_path"])
    chosen = os.environ.get(RUN_DIR_VARIABLE) or run_dir
    if chosen is None:
        raise ConfigError(
            problem(
                f"run_dir: this process has rank {global_rank()}, and nothing says which folder rank 0 chose",
                expected=f"run_dir, or {RUN_DIR_VARIABLE} in the environment of every process",
                hint="--run_dir FOLDER",
            )
        )
    folder = RunFolder(Path(chosen))
    if ckpt_path == "last":
        ckpt_path = str(folder.last_ckpt) if folder.last_ckpt.exists() else None
    return Launch(folder, ckpt_path)


def _new(run_dir: Path | None, default: Path) -> RunFolder:
    """Make a folder that was not there: `run_dir` itself, or the next of `default`, `default-2`, ..."""
    if run_dir is not None:
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError as error:
            status = RunFolder(run_dir).status() if run_dir.is_dir() else None
            hint = f"another --run_dir, or leave it out for {RUNS}/<config name>-<number>"
            if status is not None and status.command == "fit" and status.state != "finished":
                hint += "; --ckpt_path last continues this run"
            raise ConfigError(
                problem(
                    f"run_dir: {run_dir} exists already",
                    got=f"a {status.state} run of {status.config_name!r}" if status else None,
                    expected="a folder that does not exist",
                    hint=hint,
                )
            ) from error
        return RunFolder(run_dir)
    default.parent.mkdir(parents=True, exist_ok=True)
    number = max((n for n, _ in _numbered(default)), default=0) + 1
    while True:
        path = default if number == 1 else default.with_name(f"{default.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            number += 1
            continue
        return RunFolder(path)


def _numbered(default: Path) -> Iterator[tuple[int, Path]]:
    pattern = re.compile(re.escape(default.name) + r"(?:-([1-9]\d*))?")
    for path in default.parent.iterdir() if default.parent.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            yield int(match[1] or 1), path


def _runs_of(name: str, runs: Path) -> list[RunFolder]:
    """The fits of this config, oldest first."""
    folders = [RunFolder(path) for _, path in sorted(_numbered(runs / name))]
    return [f for f in folders if (s := f.status()) is not None and (s.config_name, s.command) == (name, "fit")]


def _refuse_changes(run: RunFolder, config: Mapping[str, Any]) -> None:
    before, _ = load_yaml(run.config_yaml.read_text(encoding="utf-8"), str(run.config_yaml))
    if changed := differences(before, config):
        raise ConfigError(
            problem(
                f"--ckpt_path last: the config is not the one that {run.path} was started with",
                got=("\n" + " " * 14).join(changed),
                expected="the same config; max_steps, max_time, loggers, devices and the progress bar may change",
                hint=f"--config {run.recipe_yaml}, or leave out --ckpt_path last to start a new run",
            )
        )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = dict(config.get("trainer") or {})
    callbacks = trainer.get("callbacks")
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    kept = [c for c in listed if not (isinstance(c, Mapping) and "Progress" in str(c.get("class_path")).split(".")[-1])]
    trainer["callbacks"] = [c for c in kept if c is not None]
    return {**config, "trainer": trainer}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            below = path if key == "init_args" else f"{path}.{key}" if path else str(key)
            yield from _leaves(item, below)
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    elif value not in ({}, []):
        yield path, value


_Share = tuple[Callable[[str], None], Callable[[], str]]


def _torchrun() -> _Share:
    """Write and read in the store that torchrun's agent already runs."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
    key = f"distillkit/launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return lambda text: store.set(key, text), lambda: store.get(key).decode()


def _slurm(runs: Path) -> _Share | None:
    """Write and read a file beside the run folders, named after the job step."""
    if int(os.environ.get("SLURM_NTASKS", "1")) < 2 or "SLURM_JOB_ID" not in os.environ:
        return None
    step = [os.environ.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    path = runs / f".launch-{'-'.join(step)}.json"

    def read() -> str:
        deadline = time.monotonic() + _PATIENCE.total_seconds()
        while not path.is_file():
            if time.monotonic() > deadline:
                raise ConfigError(problem(f"{path}: rank 0 wrote no run folder", hint="--run_dir FOLDER"))
            time.sleep(0.2)
        return path.read_text(encoding="utf-8")

    return lambda text: write_atomically(path, text.encode()), read
