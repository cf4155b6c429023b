"""Low-rank adapters by peft: the student's base weights stay as they are, small matrices beside them learn.

A layer with weight W [out, in] computes with W + s·B·A: A [r, in] random, B [out, r] zero at the start, s = alpha / r.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from distillkit.components import StudentBase
from distillkit.errors import ConfigError, ModelError, did_you_mean, problem
from distillkit.models import fingerprint
from distillkit.scorer import StudentScorer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "LoraSettings",
    "adapter_state",
    "apply_lora",
    "check_same_lora",
    "is_lora",
    "merged_state_dict",
    "student_base",
]

_WHERE = "model.lora"
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Which layers get an adapter, and of which size.

    Attributes:
        rank: r, columns of B and rows of A.
        alpha: the adapter's product is multiplied by alpha / rank (by alpha / √rank with `rslora`).
        dropout: must be 0: with dropout, the policy that learns is not the one that sampled, and every importance ratio
            and divergence carries its noise.
        target_modules: names of linear layers, such as `[q_proj, v_proj]`; `all-linear` is all of them but the output
            head; null is what peft chooses for this kind of model.
        rslora: scale by alpha / √rank (https://arxiv.org/abs/2312.03732), so that large ranks learn as fast.

    Raises:
        ConfigError: a rank or alpha that is not positive, dropout, or an empty list of modules.

    Example:
        >>> LoraSettings(rank=8, target_modules="all-linear").alpha
        32
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise ConfigError(problem(f"{_WHERE}.{name}", got=value, expected="at least 1"))
        if self.dropout != 0:
            where = f"{_WHERE}.dropout: the policy that learns has to be the one that sampled"
            raise ConfigError(problem(where, got=self.dropout, expected="0", hint="a smaller rank, or weight decay"))
        if self.target_modules == []:
            hint = "all-linear, or null for what peft chooses"
            raise ConfigError(problem(f"{_WHERE}.target_modules: no layer would learn", got="[]", hint=hint))

    def fingerprint(self) -> str:
        """Return the settings as one line, for checkpoints."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if name != "dropout")


def apply_lora(model: PreTrainedModel, settings: LoraSettings, *, seed: int = 0) -> PeftModel:
    """Return `model` with adapters put into it (in place); only those take gradients.

    The random half of the adapters follows from `seed` alone, and global random states stay: all ranks get the same.
    At the start the model computes what it did without adapters. Adapters of a model in half precision are float32.

    Raises:
        ConfigError: peft is not installed, or `target_modules` names what is no linear layer of the model.
        ModelError: peft knows no layers for this kind of model, or the adapter would sit on tied embeddings.
    """
    try:
        import peft
    except ImportError as error:
        where = f"{_WHERE}: LoRA needs peft"
        raise ConfigError(problem(where, got=str(error), hint="pip install distillkit[lora]")) from error
    _check_targets(model, settings)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old attribute names, and of what `_check_layers` refuses
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, config)
        except Exception as error:
            got = f"{type(model).__name__} ({type(error).__name__}: {error})"
            where, hint = f"{_WHERE}.target_modules: peft cannot put adapters into this model", "all-linear"
            raise ModelError(problem(where, got=got, expected="names of its linear layers", hint=hint)) from error
    assert isinstance(wrapped, peft.PeftModel)
    _check_layers(wrapped)
    return wrapped


def check_same_lora(settings: LoraSettings | None, saved: str | None) -> None:
    """Refuse a checkpoint whose `fingerprint` of the settings, None without LoRA, is another one.

    Raises:
        ConfigError: they differ.
    """
    now = None if settings is None else settings.fingerprint()
    if now != saved:
        where = f"{_WHERE}: not what the checkpoint was trained with"
        hint = "the config of that run, or a new run"
        raise ConfigError(problem(where, got=now or "no LoRA", expected=saved or "no LoRA", hint=hint))


def student_base(
    settings: LoraSettings | None, path: str, dtype: str, whole: Callable[[], AbstractContextManager[StudentScorer]]
) -> StudentBase | None:
    """Return what a part may know of the weights under the adapters; None without LoRA."""
    return None if settings is None else StudentBase(identity=f"{fingerprint(path)}:{dtype}", whole=whole)


def is_lora(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether `model` has adapters."""
    return hasattr(model, "peft_config")


def adapter_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return of `state`, a state dict of `module`, what learns: the adapters."""
    learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in learned}


@torch.no_grad()
def merged_state_dict(model: PeftModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights of a plain model that computes the same: W + s·B·A, in W's dtype, under the plain names.

    Neither model nor `state` is changed; weights without an adapter are returned as they are, not as copies.

    Args:
        model: the model with adapters; of its own weights nothing is read when `state` is given.
        state: `model.state_dict()`, gathered where the weights are sharded.
    """
    state = model.state_dict() if state is None else state
    layers = dict(_adapted(model))
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        owner = name.rpartition(".")[0]
        if owner.removesuffix(".base_layer") in layers and name.endswith(".base_layer.weight"):
            path = owner.removesuffix(".base_layer")
            down, up = (state[f"{path}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
            layer = layers[path]
            delta = layer.scaling[_ADAPTER] * (up @ down)
            value = (value.float() + (delta.T if layer.fan_in_fan_out else delta).to(value.device)).to(value.dtype)
        elif ".lora_" in name:
            continue
        merged[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = value
    return merged


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter by name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _check_targets(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Refuse names that are no layer (peft is content with one that is), and layers that cannot be merged."""
    if settings.target_modules is None or isinstance(settings.target_modules, str):
        return
    names = [name for name, _ in model.named_modules() if name]
    leaves = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules() if not list(m.children())}
    linear = sorted(name for name, kind in leaves.items() if kind in ("Linear", "Conv1D"))
    for target in settings.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            where = f"{_WHERE}.target_modules: {type(model).__name__} has no layer {target!r}"
            near = did_you_mean(target, linear)
            raise ConfigError(problem(where, got=target, expected=", ".join(linear), hint=near))
        if target.rpartition(".")[2] not in linear:
            where = f"{_WHERE}.target_modules: {target!r} is no linear layer"
            got = leaves.get(target.rpartition(".")[2], "a group of layers")
            raise ConfigError(problem(where, got=got, expected=", ".join(linear)))


def _check_layers(model: PeftModel) -> None:
    from peft.tuners.lora import Linear

    inner: Any = model.get_base_model()
    head, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    for name, layer in _adapted(model):
        if not isinstance(layer, Linear):
            where = f"{_WHERE}.target_modules: an adapter on {name.removeprefix('base_model.model.')} cannot be merged"
            raise ModelError(problem(where, got=type(layer).__name__, expected="linear layers", hint="all-linear"))
        if layer is head and layer.base_layer.weight is embeddings.weight:
            where = f"{_WHERE}.target_modules: the output head shares its weight with the embeddings"
            got = f"{name.removeprefix('base_model.model.')}, tied"
            hint = "leave the head out: merged, its adapter would change the embeddings too"
            raise ModelError(problem(where, got=got, expected="layers with weights of their own", hint=hint))
