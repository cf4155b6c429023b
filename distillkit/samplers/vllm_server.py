"""`vllm_server`: vLLM's own server decodes, beside the trainer or on other machines; weights go to it over TCP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.errors import ConfigError, RolloutError, problem
from distillkit.samplers.vllm_ranks import lead
from distillkit.samplers.vllm_remote import RemoteEngine
from distillkit.samplers.vllm_requests import check_above_zero, check_lengths, parameters, rollout
from distillkit.types import RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from distillkit.scorer import StudentScorer

__all__ = ["VLLMServerSampler"]


class VLLMServerSampler(RolloutSampler):
    """Samples with a vLLM server: one that runs at `url`, or one that this sampler starts and ends.

    All prompts of a step are sent at once, by token ids, a group as one request; a group is handed out when its answer
    is there. `sync` sends the student's tensors through vLLM's weight-update calls, over TCP, and drops the cached
    prefixes of the old weights; of a LoRA student all weights are sent once, then its adapter alone, which the server's
    workers add to the base weights that they keep (in float32: exact for every engine; vLLM's own LoRA would round
    between the two products and takes fewer layers). Every answer says which weights it was drawn with; another
    trainer's, or those of a server that was started again, are refused.

    Several trainer processes share one server: `sync`, to be called on all of them, waits for all, and rank 0 sends.
    With `url: null` rank 0 starts the server on its own machine, which then has to hold every rank.

    Log-probs are those of the distribution that was drawn from: at the sampling temperature, over the ids below
    `StudentInfo.vocab_limit`. The t-th rollout of a group is drawn from a stream seeded with (request.seed, t); unlike
    `hf`, another engine version or batch size may draw other tokens.

    A server for `url` is started with the command that the sampler prints when it refuses one, such as

        VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --load-format dummy
        --skip-tokenizer-init --enable-scale-out --logprobs-mode processed_logprobs --worker-extension-cls
        distillkit.samplers.vllm_worker.WorkerExtension --weight-transfer-config '{"backend": "distillkit"}'

    in an environment that has distillkit. Its development mode lets anyone who reaches the port change its weights:
    keep it on a network of your own.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: longest completion, in tokens.
        temperature: of the sampling softmax; 0 is greedy (evaluation only).
        top_p: nucleus; below 1 is refused in training, where its importance ratio is not defined.
        url: address of a server that runs; null starts one.
        port: of the server that is started; null takes a free one.
        max_model_len: longest prompt and completion of the server that is started; null is the student's own limit.
        kv_cache_gib: memory of its key/value cache; null lets vLLM decide.
        enforce_eager: it runs without compiled graphs: a faster start, slower decoding on a GPU.
        engine: its further command-line options, such as `{tensor_parallel_size: 2}`.
        environment: its further environment variables, such as `{CUDA_VISIBLE_DEVICES: "1"}`.
        start_timeout_s: longest wait for it to start.
        concurrency: requests under way at once.
        timeout_s: longest wait for one group, and for one weight update.
        retry_s: how long a request is tried again after a broken connection or a failure of the server.
        max_engine_gap: nats/token between the engine's log-probs and the trainer's above which the run stops; null only
            measures.
    """

    def __init__(
        self,
        *,
        group_size: int = 8,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        url: str | None = None,
        port: int | None = None,
        max_model_len: int | None = None,
        kv_cache_gib: float | None = 1.0,
        enforce_eager: bool = False,
        engine: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        start_timeout_s: float = 600.0,
        concurrency: int = 256,
        timeout_s: float = 600.0,
        retry_s: float = 60.0,
        max_engine_gap: float | None = 0.1,
    ) -> None:
        super().__init__(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        check_above_zero(
            {
                "port": port,
                "max_model_len": max_model_len,
                "kv_cache_gib": kv_cache_gib,
                "start_timeout_s": start_timeout_s,
                "concurrency": concurrency,
                "timeout_s": timeout_s,
                "retry_s": retry_s,
                "max_engine_gap": max_engine_gap,
            }
        )
        if url is not None and not url.startswith(("http://", "https://")):
            expected = "http://HOST:PORT of a vLLM server, or null to start one"
            raise ConfigError(problem("model.sampler.url", got=url, expected=expected))
        self.url = url
        self.port = port
        self.max_model_len = max_model_len
        self.kv_cache_gib = kv_cache_gib
        self.enforce_eager = enforce_eager
        self.engine = engine
        self.environment = environment
        self.start_timeout_s = start_timeout_s
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self.max_engine_gap = max_engine_gap
        self._info: StudentInfo | None = None
        self._remote: RemoteEngine | None = None

    def break_off(self) -> None:
        if self._remote is not None:
            self._remote.break_off()

    def setup(self, student: StudentInfo) -> None:
        """Keep what is needed to know about the student's tokens; the server is met with the first weights."""
        self._info = student

    def sync(self, student: StudentScorer) -> None:
        """Give the server the student's weights; on every rank, and back on every rank when the server has them.

        Raises:
            ConfigError: no server at `url`, or one that was not started for this.
            ModelError: the server serves another model, or cannot run this one; an adapter it cannot take.
            RolloutError: the weights could not be sent.
        """
        if self._info is None:
            raise RolloutError(problem("VLLMServerSampler.sync", got="no setup", expected="setup(info) before it"))
        if self._remote is None:
            self._remote = RemoteEngine(self)
        remote = self._remote
        lead(lambda: remote.update(student), remote.adopt, self._info.device)

    def teardown(self) -> None:
        """End the server, if it was started here."""
        if self._remote is not None:
            self._remote.close()
            self._remote = None

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield one group per request as soon as the server has finished it.

        Raises:
            RolloutError: called before `setup` and `sync`; a prompt that leaves too few positions; a server that fails
                for longer than `retry_s`, or gives what is not a group of this request.
        """
        if self._info is None or self._remote is None or not self._remote.ready:
            where = "VLLMServerSampler.sample"
            raise RolloutError(problem(where, got="no student yet", expected="setup(info) and sync(student) before it"))
        check_lengths(requests, self._remote.limit, "the server's --max-model-len")
        return self._groups(tuple(requests), self._info, self._remote)

    def _groups(
        self, requests: tuple[SampleRequest, ...], info: StudentInfo, remote: RemoteEngine
    ) -> Iterator[RolloutGroup]:
        settings = [parameters(request, info) for request in requests]
        for place, completions in remote.generate([request.prompt_ids for request in requests], settings):
            request = requests[place]
            yield RolloutGroup(request=request, rollouts=tuple(rollout(request, c, info) for c in completions))
