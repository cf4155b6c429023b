"""A vLLM engine in this process: weights in, token ids and log-probs out. The one file that knows vLLM's names."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

from distillkit.errors import RolloutError, problem
from distillkit.samplers.vllm_requests import EngineCompletion
from distillkit.samplers.vllm_weights import Piece, StudentWeights, assemble
from distillkit.samplers.vllm_worker import load_weights

__all__ = ["InProcessEngine"]


class InProcessEngine:
    """An engine without weights of its own: `load` gives it the trainer's, as often as they change.

    Args:
        config: the model's Hugging Face config.
        max_model_len: prompt and completion tokens of the longest sequence.
        arguments: further arguments of `vllm.LLM`.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, config: Any, *, max_model_len: int, arguments: Mapping[str, Any]) -> None:
        # Weights are handed over as tensors, so the engine has to live in this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else some lines at every sync
        self._asleep = False
        self._unwanted = threading.Event()
        self._can_sleep = bool(arguments.get("enable_sleep_mode"))
        self._joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        with _undisturbed(), tempfile.TemporaryDirectory(prefix="distillkit-vllm-") as folder:
            import vllm

            if self._joined:
                arguments = {**_in_the_trainers_group(), **arguments}
            config.save_pretrained(folder)
            self._vllm = vllm
            self._llm = vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                logprobs_mode="processed_logprobs",
                max_model_len=max_model_len,
                disable_log_stats=True,
                **arguments,
            )

    def load(self, weights: StudentWeights, *, complete: bool) -> None:
        """Replace the weights, or the adapted ones, and forget prefixes computed with the old ones.

        The bases of an adapter are the trainer's own tensors: they are not kept a second time.
        """
        self._wake()
        complete = complete or not weights.adapted
        pieces = weights.everything() if complete else weights.blocks()
        self._llm.collective_rpc(_load, args=(pieces, complete))
        self._llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, list[EngineCompletion]]]:
        """Yield the place of a prompt and its completions, each prompt as soon as its last one is finished.

        Args:
            prompts: token ids.
            settings: arguments of `vllm.SamplingParams`, one mapping a prompt.

        Raises:
            RolloutError: the engine failed, or `break_off` was called.
        """
        self._wake()
        engine = self._llm.llm_engine
        final = self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        for i, (ids, own) in enumerate(zip(prompts, settings, strict=True)):
            params = self._vllm.SamplingParams(**own, output_kind=final)
            engine.add_request(str(i), {"prompt_token_ids": list(ids)}, params)
        try:
            while engine.has_unfinished_requests():
                if self._unwanted.is_set():
                    raise RolloutError(problem("model.sampler: not sampled", got="sampling was ended"))
                for output in self._step(engine):
                    if output.finished:
                        yield int(output.request_id), [_completion(o) for o in output.outputs]
        finally:
            if engine.has_unfinished_requests():  # the consumer stopped early
                engine.abort_request([str(i) for i in range(len(prompts))])
            if self._can_sleep:
                self._llm.sleep(level=1)  # level 2 would lose the weights that an adapter's sync does not send again
                self._asleep = True

    def _step(self, engine: Any) -> Any:
        try:
            return engine.step()
        except Exception as error:
            where = "model.sampler: the vLLM engine failed while it sampled"
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "out of memory? a smaller model.sampler.kv_cache_gib, or fewer data.prompts_per_step"
            raise RolloutError(problem(where, got=got, hint=hint)) from error

    def break_off(self) -> None:
        """End a `generate` that another thread runs, and every later one."""
        self._unwanted.set()

    def close(self) -> None:
        """Free the engine's memory; a process group of the trainer's stays."""
        from vllm.v1.engine import core

        del self._llm
        gc.collect()
        core.cleanup_dist_env_and_memory()

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def _in_the_trainers_group() -> dict[str, Any]:
    """Arguments of an engine in a process that trains with others: one device, no process group of its own.

    vLLM 0.32 destroys the process group of the whole process with each engine; here it is left alone.
    """
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = destroy_model_parallel
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
    os.environ.setdefault("LOCAL_RANK", str(device))
    return {"distributed_executor_backend": "external_launcher"}


def _completion(output: Any) -> EngineCompletion:
    ids = tuple(output.token_ids)
    logprobs = tuple(float(entry[token].logprob) for token, entry in zip(ids, output.logprobs, strict=True))
    return EngineCompletion(ids=ids, logprobs=logprobs, stopped=output.finish_reason == "stop")


def _load(worker: Any, pieces: list[Piece], complete: bool) -> None:
    """Run in the worker."""
    runner = worker.model_runner
    weights = assemble(pieces, {}, worker.device)
    load_weights(runner.get_model(), runner.vllm_config, weights, complete=complete)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the process's random states and thread settings from vLLM's start, which sets both."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
