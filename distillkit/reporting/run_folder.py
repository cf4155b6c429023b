"""The folder of one run: what lies where, written so that a killed run never leaves half a file."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distillkit.errors import ConfigError, DataError, problem
from distillkit.reporting.files import write_atomically

__all__ = ["RunFolder", "RunState", "RunStatus", "atomic_write_text"]

RunState = Literal["running", "finished", "stopped", "failed"]
"""`running` also stands in a folder whose run was killed: only the lock tells the two apart."""


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write_text(Path(folder) / "a.txt", "x")
        ...     sorted(p.name for p in Path(folder).iterdir())
        ['a.txt']
    """
    write_atomically(path, text.encode("utf-8"))


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What `status.json` says: which config the run is of, which command, how it stands, and why it ended."""

    config_name: str
    command: str
    state: RunState
    started: str
    reason: str = ""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name; nothing is created by asking for a path.

    Example:
        >>> RunFolder(Path("runs/quickstart")).last_ckpt.as_posix()
        'runs/quickstart/checkpoints/last.ckpt'
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def recipe_yaml(self) -> Path:
        """What the user wrote, with the command line's overrides."""
        return self.path / "recipe.yaml"

    @property
    def config_yaml(self) -> Path:
        """The whole config, every default spelled out; a valid `--config` again."""
        return self.path / "config.yaml"

    @property
    def environment_json(self) -> Path:
        """Versions, commit, and hashes of data and models."""
        return self.path / "environment.json"

    @property
    def status_json(self) -> Path:
        """Whether the run is finished."""
        return self.path / "status.json"

    @property
    def metrics_csv(self) -> Path:
        """One row per rollout step."""
        return self.path / "metrics.csv"

    @property
    def rollouts(self) -> Path:
        """Folder of the rollout files, one JSONL per logged step."""
        return self.path / "rollouts"

    @property
    def eval(self) -> Path:
        """Folder of per-problem results, one JSONL per evaluation set."""
        return self.path / "eval"

    @property
    def plots(self) -> Path:
        """Folder of PNG plots."""
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        """Folder of Lightning checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_ckpt(self) -> Path:
        """The checkpoint that `--ckpt_path last` continues from."""
        return self.checkpoints / "last.ckpt"

    @property
    def student(self) -> Path:
        """The exported student, in Hugging Face format."""
        return self.path / "student"

    def status(self) -> RunStatus | None:
        """Return what `status.json` says, None where there is none.

        Raises:
            DataError: the file is not what distillkit writes.
        """
        try:
            return RunStatus(**json.loads(self.status_json.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(
                problem(
                    f"{self.status_json}: not a status file",
                    got=str(error),
                    expected="the JSON object that distillkit writes",
                    hint=f"move {self.path} away, or start with another run_dir",
                )
            ) from error

    def begin(self, config_name: str, command: str) -> None:
        """Mark the run as running; a continued run keeps the time it was first started."""
        before = self.status()
        started = before.started if before else time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write_status(RunStatus(config_name=config_name, command=command, state="running", started=started))

    def end(self, state: RunState, reason: str = "") -> None:
        """Mark how the run ended; `finished` is what keeps `--ckpt_path last` from continuing it."""
        status = self.status()
        if status is not None:
            self._write_status(replace(status, state=state, reason=reason))

    def record(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` (JSON-able) into `environment.json`."""
        known: dict[str, Any] = {}
        if self.environment_json.exists():
            known = json.loads(self.environment_json.read_text(encoding="utf-8"))
        atomic_write_text(self.environment_json, json.dumps({**known, **facts}, indent=2, default=str) + "\n")

    def lock(self) -> None:
        """Claim the folder for this process, until it ends however it ends.

        A record lock, not the presence of a file: a killed run leaves nothing behind, and child processes do not
        inherit it.

        Raises:
            ConfigError: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # not a POSIX system: the folder goes unguarded
            return
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise ConfigError(
                problem(
                    f"{self.path}: another process is running in this folder",
                    expected="a run that was stopped or killed",
                    hint="wait for it, or leave out --ckpt_path last to start a new run",
                )
            ) from error
        except OSError:  # a file system without locks: the folder goes unguarded
            os.close(descriptor)
            return
        _held.append(descriptor)

    def discard(self) -> None:
        """Remove the folder of a run that was refused before it did anything; with anything else in it, it stays."""
        own = {self.recipe_yaml, self.config_yaml, self.environment_json, self.status_json, self.path / _LOCK}
        with contextlib.suppress(OSError):
            if set(self.path.iterdir()) <= own:
                for path in own:
                    path.unlink(missing_ok=True)
                self.path.rmdir()

    def _write_status(self, status: RunStatus) -> None:
        atomic_write_text(self.status_json, json.dumps(asdict(status), indent=2) + "\n")


_LOCK = ".lock"

_held: list[int] = []
"""Descriptors of the locks this process holds; closing one would release its lock."""
