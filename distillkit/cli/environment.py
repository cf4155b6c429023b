"""What a run ran on: versions, commit, and the packages its parts came from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import distillkit

__all__ = ["describe", "git_commit", "part_distributions"]

_LIBRARIES = (
    "torch",
    "lightning",
    "transformers",
    "jsonargparse",
    "torchmetrics",
    "datasets",
    "safetensors",
    "numpy",
    "math-verify",
    "vllm",
    "deepspeed",
    "peft",
)


def describe(argv: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of `environment.json` that are known before anything is loaded.

    Args:
        argv: the arguments of the `distillkit` command.
        config: the canonical config; its class paths name the packages that took part.
    """
    import torch

    return {
        "command": ["distillkit", *argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "distillkit": {"version": distillkit.__version__, "commit": git_commit(Path(distillkit.__file__).parent)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        "parts": part_distributions(config),
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit that `folder` is checked out at, with `+changes` after it, or None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def part_distributions(config: Mapping[str, Any]) -> dict[str, str]:
    """Return distribution -> version of every package that a class path of `config` lies in.

    Example:
        >>> list(part_distributions({"optimizer": {"class_path": "torch.optim.AdamW"}}))
        ['torch']
    """
    owners = metadata.packages_distributions()
    found: dict[str, str] = {}
    for path in _class_paths(config):
        for name in owners.get(path.split(".")[0], []):
            found[name] = _version(name) or ""
    return found


def _version(name: str) -> str | None:
    if name in sys.modules and isinstance(version := getattr(sys.modules[name], "__version__", None), str):
        return version
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("class_path", "function") and isinstance(item, str):
                yield item
            yield from _class_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item)
