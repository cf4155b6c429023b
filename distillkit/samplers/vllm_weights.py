"""The student's tensors as an engine takes them: by checkpoint name, and of a LoRA student its factors alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distillkit.errors import ModelError, problem

if TYPE_CHECKING:
    from distillkit.scorer import StudentScorer

__all__ = ["Part", "Piece", "StudentWeights", "assemble"]

Part = Literal["whole", "base", "down", "up"]
"""A weight as it is; one that adapters change, or that an engine loads together with such a one; A; B of LoRA."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One tensor on its way to an engine. `name` is that of the weight; `scale` is that of its LoRA, with `up`."""

    name: str
    part: Part
    tensor: Tensor
    scale: float = 1.0


def assemble(
    pieces: Iterable[Piece], kept: MutableMapping[str, Tensor], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that an engine has to load: W, or W + scale · B A computed in float32, in W's dtype.

    Args:
        pieces: in the order of `StudentWeights`: factors after all bases.
        kept: the bases of earlier calls; those of this call are added.
        device: where the weights are wanted.
    """
    factors: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        if piece.part == "whole":
            yield piece.name, piece.tensor.to(device)
        elif piece.part == "base":
            kept[piece.name] = piece.tensor
        else:
            factors.setdefault(piece.name, {})[piece.part] = piece
    for name, stored in kept.items():
        base = stored.to(device)
        if name not in factors:
            yield name, base
            continue
        down, up = factors[name]["down"], factors[name]["up"]
        delta = up.tensor.to(device).float() @ down.tensor.to(device).float()
        yield name, (base.float() + up.scale * delta).to(base.dtype)


class StudentWeights:
    """The pieces of a student, plain or wrapped by peft.

    Engines fuse weights (query, key and value; gate and up) and load a fused one as a whole. What shares a block with
    an adapted weight (`model.layers.3.self_attn`) is therefore loaded anew with it.

    Raises:
        ModelError: adapters that are more than plain LoRA on linear layers.
    """

    def __init__(self, student: StudentScorer) -> None:
        model: Any = student.model
        adapted = hasattr(model, "get_base_model")
        plain: Any = model.get_base_model() if adapted else model
        sides = plain.get_input_embeddings(), plain.get_output_embeddings()
        # Rows of embedding and head beyond the shared vocabulary stay out; a head that is the embedding comes once.
        by_token = {id(parameter) for side in sides for parameter in side.parameters()}

        def within(parameter: Tensor) -> Tensor:
            whole = parameter.detach()
            return whole[: student.vocab_limit] if id(parameter) in by_token else whole

        layers = _lora_layers(plain) if adapted else []
        self._factors = [
            piece
            for name, down, up, scale in layers
            for piece in (
                Piece(name=name, part="down", tensor=down.detach()),
                Piece(name=name, part="up", tensor=within(up), scale=scale),
            )
        ]
        own = {id(factor) for _, down, up, _ in layers for factor in (down, up)}
        self._weights: dict[str, Tensor] = {}
        for name, parameter in plain.named_parameters():
            if id(parameter) in own:
                continue
            if adapted and _FOREIGN.search(name):
                _refuse(name)
            self._weights[name.replace(".base_layer.", ".")] = within(parameter)
        changed = {name for name, *_ in layers}
        if missing := changed - self._weights.keys():
            _refuse(f"{min(missing)}, which shares its weight with another layer")
        blocks = {_block(name) for name in changed}
        self._bases = {name for name in self._weights if _block(name) in blocks}

    @property
    def adapted(self) -> bool:
        """Whether the student has adapters, which can be sent alone once the rest is there."""
        return bool(self._factors)

    def everything(self) -> list[Piece]:
        """All weights, then the adapter."""
        plain = [Piece(name=n, part="whole", tensor=t) for n, t in self._weights.items() if n not in self._bases]
        return plain + self.blocks()

    def blocks(self) -> list[Piece]:
        """The weights of all blocks with adapters, then the adapter."""
        return [Piece(name=n, part="base", tensor=t) for n, t in self._weights.items() if n in self._bases] + (
            self.adapter()
        )

    def adapter(self) -> list[Piece]:
        """The adapter alone."""
        return list(self._factors)


_FOREIGN = re.compile(r"(^|\.)(lora_|modules_to_save|original_module|trainable_tokens|ranknum|vera_|hada_|lokr_)")
_BLOCK = re.compile(r"(?P<block>.*?\.\d+\.[^.]+)\.")


def _block(name: str) -> str:
    """`model.layers.3.self_attn` of `model.layers.3.self_attn.q_proj.weight`; outside layers, the module itself."""
    match = _BLOCK.match(name)
    return match["block"] if match else name.rpartition(".")[0]


def _lora_layers(model: nn.Module) -> list[tuple[str, Tensor, Tensor, float]]:
    """Name of the weight, A [r, in], B [out, r] and scale of every layer with an adapter."""
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer: Any = module
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if len(active) != 1 or len(layer.lora_A) != 1 or layer.merged or layer.disable_adapters:
            _refuse(f"{name}: adapters {list(layer.lora_A)}, merged: {layer.merged}, off: {layer.disable_adapters}")
        adapter, base = active[0], layer.get_base_layer()
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        variant = layer.lora_variant.get(adapter)
        if not isinstance(base, nn.Linear) or up.bias is not None or variant is not None:
            kind = type(base).__name__ if variant is None else type(variant).__name__
            _refuse(f"{name}: {kind}{' with a bias in its adapter' if up.bias is not None else ''}")
        found.append((f"{name}.weight", down.weight, up.weight, float(layer.scaling[adapter])))
    if not found:
        _refuse("no LoRA layer")
    return found


def _refuse(got: str) -> None:
    raise ModelError(
        problem(
            "model.sampler: an engine cannot take this adapter",
            got=got,
            expected="plain LoRA on linear layers, one adapter, active and not merged",
            hint="model.sampler: hf",
        )
    )
