"""A vLLM server that ends with the trainer: `python -m distillkit.samplers.vllm_launch OPTIONS`.

A trainer that is killed cannot end its children. Its end of this process's standard input closes all the same.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading

from distillkit.samplers.vllm_process import SERVER_MODULE

__all__ = ["main"]


def main() -> None:
    """Run the server with this process's arguments until it ends or standard input does."""
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    sys.argv[0] = SERVER_MODULE
    runpy.run_module(SERVER_MODULE, run_name="__main__", alter_sys=True)


def _end_with_trainer() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
