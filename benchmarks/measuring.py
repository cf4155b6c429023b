"""One measured process after the other, its peak memory, and a record of JSON lines that can be gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from strategies import descendants, resident_peak

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_EVERY, _TREE_EVERY = 0.05, 0.2


class Record:
    """A file of JSON lines, one per measurement; `key` names the fields that tell two measurements apart.

    Args:
        path: of the file.
        key: fields of a line.
        resume: go on with a file that has lines.

    Raises:
        SystemExit: the file has lines and `resume` is false; measurements of two runs are not to be compared.
    """

    def __init__(self, path: Path, key: Sequence[str], *, resume: bool) -> None:
        self.path, self.key = path, tuple(key)
        if not resume and path.exists() and path.read_text().strip():
            raise SystemExit(f"{path}: has measurements; --resume goes on with them, or move the file away")
        self._known = {self._of(line) for line in lines(path)}

    def _of(self, line: dict[str, Any]) -> tuple[Hashable, ...]:
        return tuple(json.dumps(line.get(name), sort_keys=True) for name in self.key)

    def has(self, **key: Any) -> bool:
        """Return whether there is a measurement of this key."""
        return self._of(key) in self._known

    def add(self, line: dict[str, Any]) -> None:
        """Append a measurement."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._known.add(self._of(line))


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the measurements of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def proportional(pid: int) -> int:
    """Return a process's share of the memory that it maps (PSS), bytes; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


class _Watch:
    """The peak memory of a process tree, bytes, so far.

    The kernel keeps the largest resident set of every process (VmHWM): short peaks are in it, however seldom it is
    read. A tree of several processes can be larger than its largest one: then the sum of their shares counts too.
    """

    def __init__(self, root: int) -> None:
        self.root, self.pids, self.peak, self.processes = root, [root], 0, 1
        self._tree_at = 0.0

    def look(self) -> None:
        if time.monotonic() >= self._tree_at:
            self.pids, self._tree_at = descendants(self.root), time.monotonic() + _TREE_EVERY
            self.processes = max(self.processes, len(self.pids))
            if len(self.pids) > 1:
                self.peak = max(self.peak, sum(proportional(pid) for pid in self.pids))
        self.peak = max(self.peak, 1024 * max(resident_peak(pid) for pid in self.pids))


def write_inputs_apart(case: str, steps: int, folder: Path) -> None:
    """Write what `cases.py` writes, in a process of its own: what that leaves in a heap is in no measured one."""
    command = (sys.executable, str(ROOT / "benchmarks" / "cases.py"), "--case", case, "--steps", str(steps))
    subprocess.run((*command, str(folder)), check=True)


def measured(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a command that prints a line of JSON last; add when it began, and the peak memory of its process tree, bytes.

    Raises:
        SystemExit: the command failed.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
    }  # fmt: skip
    begin = {"started": round(time.time()), "load": os.getloadavg()[0]}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = _Watch(running.pid)
    while True:
        watch.look()
        try:
            out, err = running.communicate(timeout=_EVERY)
            break
        except subprocess.TimeoutExpired:
            continue
    if running.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {running.returncode}\n{err[-3000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**found, **begin, "peak_bytes": watch.peak, "processes": watch.processes}
