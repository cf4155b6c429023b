"""From a recipe's module and data to the numbers of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from distillkit.data import PromptData
from distillkit.errors import ConfigError, problem
from distillkit.planning.head_arrays import head_arrays
from distillkit.planning.model_shape import ModelShape, read_shape, shape_of
from distillkit.planning.workload import SamplerKind, Sampling, Scorer, Strategy, Workload
from distillkit.refusals import teacher_request
from distillkit.scorer import ScorePlan
from distillkit.training.base import StudentModule
from distillkit.training.fresh import fresh_config
from distillkit.types import ScoreRequest

__all__ = ["Assumptions", "read_workload", "strategy_of"]

_STRATEGIES: dict[str, Strategy] = {
    "auto": "single",
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "deepspeed": "deepspeed_stage_2",
    "deepspeed_stage_2": "deepspeed_stage_2",
    "deepspeed_stage_3": "deepspeed_stage_3",
}
_CLASSES = {"SingleDeviceStrategy": "auto", "DDPStrategy": "ddp", "FSDP2Strategy": "fsdp2"}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a recipe does not say: configs in place of checkpoints, lengths, and how many ranks train."""

    ranks: int
    device: Literal["cuda", "cpu"]
    student_config: str | None = None
    teacher_config: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: float | None = None
    notes: list[str] = field(default_factory=list)


def strategy_of(value: object, ranks: int) -> Strategy:
    """Return what `trainer.strategy` means for memory; `auto` is DDP where there are several ranks.

    Raises:
        ConfigError: a strategy whose memory is not known.
    """
    name = str(value)
    if (path := getattr(value, "class_path", None)) is not None:
        kind, given = str(path).rpartition(".")[2], getattr(value, "init_args", {})
        stage = given.get("stage", 2) if kind in ("ZeroStrategy", "DeepSpeedStrategy") else None
        name = _CLASSES.get(kind, kind) if stage is None else f"deepspeed_stage_{stage}"
    if name not in _STRATEGIES:
        raise ConfigError(problem("trainer.strategy: no plan for it", got=name, expected=", ".join(_STRATEGIES)))
    strategy = _STRATEGIES[name]
    return "ddp" if strategy == "single" and ranks > 1 else strategy


def read_workload(
    name: str, module: StudentModule, data: PromptData, *, strategy: object, precision: object, given: Assumptions
) -> Workload:
    """Return the numbers of one step of a recipe.

    Args:
        name: of the recipe.
        module: from its `model`, not set up.
        data: from its `data`, not read.
        strategy: `trainer.strategy`.
        precision: `trainer.precision`.
        given: what the recipe does not say; `notes` collects what was assumed.

    Raises:
        ConfigError: a strategy that is not known.
        ModelError: a model whose config cannot be read.
    """
    student = _student_shape(module, given)
    kind = strategy_of(strategy, given.ranks)
    mixed = str(precision) == "bf16-mixed"
    sharded = kind in ("deepspeed_stage_2", "deepspeed_stage_3")
    bytes_per_weight = 2 if module.dtype_name in ("bfloat16", "float16") or (mixed and sharded) else 4
    if module.dtype_name == "auto":
        given.notes.append("model.dtype auto: taken as float32")
    lora = getattr(module, "lora", None)
    trainable = student.parameters
    if lora is not None:
        trainable = student.adapter_parameters(lora.rank, lora.target_modules)
    own: Any = module
    settings = own.settings
    parts: Any = getattr(module, "parts", None)
    request = _request(module, parts)
    scorers = tuple(_scorers(module, request, given))
    plan = ScorePlan(
        sampling_temperature=1.0 if module.sampler is None else module.sampler.temperature or 1.0,
        distil_temperature=settings.distil_temperature,
        divergence=parts.divergence if parts is not None else own.divergence,
        reference_divergence=None if parts is None else parts.reference_divergence,
    )
    autocast = mixed and kind in ("single", "ddp") and bytes_per_weight == 4
    several = settings.inner_epochs * settings.minibatches
    state_bytes, fused = _optimizer_state(module.make_optimizer, 4 if sharded or lora else bytes_per_weight)
    return Workload(
        name=name,
        student=student,
        strategy=kind,
        ranks=given.ranks,
        device=given.device,
        bytes_per_weight=bytes_per_weight,
        autocast=autocast,
        compute_bytes=2 if mixed and not autocast else bytes_per_weight,
        checkpointing=module.gradient_checkpointing,
        trainable=trainable,
        optimizer_bytes=state_bytes,
        optimizer_fused=fused,
        sampling=_sampling(module, data, given),
        prompts_per_step=data.prompts_per_step,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        head_chunk=module.head_chunk,
        head_arrays=head_arrays(plan, autocast=mixed),
        vocab_limit=min([student.vocabulary, *(s.shape.vocabulary for s in scorers if s.role != "reward model")]),
        passes=settings.inner_epochs,
        updates=several,
        one_step_off=getattr(settings, "one_step_off", False),
        old_pass=several > 1 or settings.distill_through == "reward",
        scorers=scorers,
    )


def _student_shape(module: StudentModule, given: Assumptions) -> ModelShape:
    entries = getattr(module, "init", None)
    if given.student_config is None and entries is not None:
        return shape_of(fresh_config(entries, module.tokenizer), name="model.init")
    source = given.student_config or module.student
    shape = read_shape(source, where="model.student", option="--student-config")
    return replace(shape, name=module.student)


def _request(module: StudentModule, parts: Any) -> ScoreRequest:
    if parts is not None:
        return teacher_request(parts)
    divergence = getattr(module, "divergence", None)
    return ScoreRequest() if divergence is None else divergence.needs


def _scorers(module: StudentModule, request: ScoreRequest, given: Assumptions) -> Iterator[Scorer]:
    parts: Any = getattr(module, "parts", None)
    for role, part in module.frozen.items():
        wanted = request if role == "teacher" else ScoreRequest(sampled=True)
        if role == "reference" and parts is not None and parts.reference_divergence is not None:
            wanted = parts.reference_divergence.needs
        for found in _models(part):
            yield _scorer(role, found, wanted, given, module)
    for reward in module.rewards:
        for model in (getattr(reward, "decomposer", None), getattr(reward, "judge", None)):
            if isinstance(getattr(model, "path", None), str):
                yield _scorer("reward model", model, ScoreRequest(), given, module)


def _models(part: Any) -> Iterator[Any]:
    """The frozen models behind a scorer: those of a cache, a mixture or an extrapolation one by one."""
    inner = [getattr(part, name, None) for name in ("teacher", "base", "teachers")]
    listed = [
        list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, list | tuple) else [x] for x in inner
    ]
    found = [x for group in listed for x in group if x is not None]
    if not found:
        yield part
    for one in found:
        yield from _models(one)


def _scorer(role: str, part: Any, wanted: ScoreRequest, given: Assumptions, module: StudentModule) -> Scorer:
    own = type(part).__name__ == "AdapterOffTeacher"
    path = module.student if own else getattr(part, "path", None) or getattr(part, "model", None)
    replaced = given.student_config if own else given.teacher_config if role == "teacher" else None
    if not isinstance(replaced or path, str):
        where = f"model.{role}: {type(part).__name__} does not say which model it runs"
        raise ConfigError(problem(where, expected="its sizes", hint="--teacher-config FOLDER_OR_CONFIG_JSON"))
    option = "--student-config" if own else "--teacher-config"
    shape = read_shape(str(replaced or path), where=f"model.{role}", option=option)
    dtype = module.dtype_name if own else getattr(part, "dtype", "bfloat16")
    if dtype == "auto" and role != "reward model":
        given.notes.append(f"model.{role}.dtype auto: the checkpoint's own, taken as float32")
    return Scorer(
        role=role,
        shape=replace(shape, name=str(path or replaced)),
        bytes_per_weight=2 if dtype in ("bfloat16", "float16") else 4,
        local=isinstance(path, str) and not getattr(part, "urls", None),
        own_weights=not own,
        tokens_per_batch=int(getattr(part, "tokens_per_batch", 16384)),
        head_chunk=getattr(part, "head_chunk", None),
        keeps_hidden=wanted.needs_distribution,
        topk=wanted.topk,
    )


def _sampling(module: StudentModule, data: PromptData, given: Assumptions) -> Sampling:
    prompt = given.prompt_tokens or data.max_prompt_tokens
    if prompt is None:
        prompt = 512
        given.notes.append("data.max_prompt_tokens is not set: prompts of 512 tokens (--prompt-tokens)")
    sampler: Any = module.sampler
    trains_on_given = module.needs_completions
    new = data.max_completion_tokens if trains_on_given else sampler.max_new_tokens
    if new is None:
        new = 1024
        given.notes.append("data.max_completion_tokens is not set: completions of 1,024 tokens")
    mean = given.completion_tokens or new / 2
    kind = "none" if trains_on_given else _kind(sampler)
    cache = getattr(sampler, "kv_cache_gib", None)
    return Sampling(
        kind=kind,
        group=1 if trains_on_given else sampler.group_size,
        prompt_tokens=prompt,
        new_tokens=new,
        mean_new_tokens=min(mean, new),
        rows=int(getattr(sampler, "rows_per_batch", 256)),
        kv_cache_bytes=None if cache is None else cache * 2**30,
    )


def _kind(sampler: Any) -> SamplerKind:
    """Which engine a sampler decodes with; a mixture's is that of the sampler in it, replay has none."""
    inner = getattr(sampler, "sampler", None)
    if inner is not None:
        return _kind(inner)
    name = type(sampler).__name__.lower()
    if "server" in name:
        return "vllm_server"
    return "vllm" if "vllm" in name else "none" if "replay" in name else "hf"


def _optimizer_state(make: Callable[[Any], torch.optim.Optimizer], width: int) -> tuple[float, bool]:
    """Bytes of state per parameter, and whether it is fused, by one step of the recipe's own on a small tensor."""
    size = 4096
    parameter = torch.nn.Parameter(torch.zeros(size, dtype=torch.float32 if width == 4 else torch.bfloat16))
    optimizer = make([parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [x for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor) and x.numel() > 1]
    state = sum(x.numel() * x.element_size() for x in tensors) / size
    return state, all(group.get("fused") for group in optimizer.param_groups)
