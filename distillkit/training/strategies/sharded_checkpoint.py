"""Checkpoints that are folders of shards, replaced as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["remove_sharded", "replaced_folder"]


@contextmanager
def replaced_folder(strategy: Any, path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder for every rank to write into; afterwards `path` is a link to it.

    A link is replaced in one rename, a folder is not: whenever the run dies, `path` is the old checkpoint or the new
    one. The folder that it replaces is removed. Every rank has to enter and leave.

    Args:
        strategy: gives `broadcast`, `barrier` and `is_global_zero`.
        path: of the checkpoint.
    """
    target = Path(path)
    made = ""
    if strategy.is_global_zero:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")
        os.chmod(made, 0o755)
    folder = Path(strategy.broadcast(made))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    strategy.barrier()
    if strategy.is_global_zero:
        _flush(folder)
        old = target.parent / os.readlink(target) if target.is_symlink() else None
        if target.exists() and old is None:
            remove_sharded(target)
        link = folder.with_name(f"{folder.name}.link")
        link.symlink_to(folder.name)
        os.replace(link, target)
        if old is not None and old != folder:
            shutil.rmtree(old, ignore_errors=True)
    strategy.barrier()


def remove_sharded(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint: a file, a folder, or a link to a folder with the folder."""
    target = Path(path)
    if target.is_symlink():
        shutil.rmtree(target.parent / os.readlink(target), ignore_errors=True)
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    for file in (p for p in folder.rglob("*") if p.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
