"""Two hosts on one machine, for tests: network namespaces joined by a cable, or, where not permitted, two addresses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["Hosts"]


class Hosts:
    """Host 0 and host 1; `kind` is `namespaces` or `loopback addresses`."""

    def __init__(self) -> None:
        self._names = [f"dk{os.getpid()}-{k}" for k in range(2)]
        self._started: list[subprocess.Popen[bytes]] = []
        self.kind = "namespaces" if self._namespaces() else "loopback addresses"
        self.addresses = ["10.77.0.1", "10.77.0.2"] if self.kind == "namespaces" else ["127.0.0.2", "127.0.0.3"]
        self.interface = "cable" if self.kind == "namespaces" else "lo"

    def _namespaces(self) -> bool:
        one, two = self._names
        commands = [
            f"netns add {one}",
            f"netns add {two}",
            f"-n {one} link add cable type veth peer name cable netns {two}",
        ]
        for k, name in enumerate(self._names):
            up = [f"addr add 10.77.0.{k + 1}/24 dev cable", "link set cable up", "link set lo up"]
            commands += [f"-n {name} {command}" for command in up]
        return shutil.which("ip") is not None and all(_ip(command) for command in commands)

    def start(self, host: int, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on a host; what it prints goes to `log`."""
        inside = ["ip", "netns", "exec", self._names[host]] if self.kind == "namespaces" else []
        settings = {"GLOO_SOCKET_IFNAME": self.interface, "OMP_NUM_THREADS": "1", **variables}
        with log.open("wb") as stream:
            streams: Any = {"stdout": stream, "stderr": stream}
            started = subprocess.Popen(
                [*inside, *command], env={**os.environ, **settings}, start_new_session=True, **streams
            )
        self._started.append(started)
        return started

    def received(self, host: int) -> int:
        """Bytes that came to a host over the cable."""
        file = "/sys/class/net/cable/statistics/rx_bytes"
        command = ["ip", "netns", "exec", self._names[host], "cat", file]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    def cut(self, process: subprocess.Popen[bytes]) -> None:
        """Pull the cable of host 1; with loopback addresses, kill its `process` group instead."""
        if self.kind == "namespaces":
            assert _ip(f"-n {self._names[1]} link set cable down")
        else:
            os.killpg(process.pid, signal.SIGKILL)

    def mend(self) -> None:
        """Put the cable back."""
        if self.kind == "namespaces":
            assert _ip(f"-n {self._names[1]} link set cable up")

    def close(self) -> None:
        """End what was started, and remove the namespaces."""
        for process in self._started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
        for name in self._names if shutil.which("ip") else ():
            _ip(f"netns del {name}")


def _ip(arguments: str) -> bool:
    return subprocess.run(["ip", *arguments.split()], capture_output=True).returncode == 0
