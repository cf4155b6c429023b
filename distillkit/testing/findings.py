"""Collect broken rules, watch inputs for edits, and move rollouts about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["ConformanceError", "Findings", "close", "pad", "permute", "tensors"]

T = TypeVar("T")


class ConformanceError(AssertionError):
    """A part breaks its slot's contract; `failures` holds every broken rule."""

    def __init__(self, subject: str, failures: Sequence[str]) -> None:
        self.subject = subject
        self.failures = tuple(failures)
        super().__init__("\n  - ".join([f"{subject} breaks its contract:", *self.failures]))


class Findings:
    """The broken rules of one part."""

    def __init__(self, subject: object) -> None:
        self.subject = type(subject).__name__
        self.failures: list[str] = []

    def expect(self, ok: object, text: str) -> bool:
        """Record `text` unless `ok`; return whether it was."""
        if not ok and text not in self.failures:
            self.failures.append(text)
        return bool(ok)

    @contextlib.contextmanager
    def rule(self, text: str, *passing: type[Exception]) -> Iterator[None]:
        """Record an exception raised inside as a broken rule; those of type `passing` go on to the caller."""
        try:
            yield
        except passing:
            raise
        except Exception as error:
            self.expect(
                False, f"{text}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )

    @contextlib.contextmanager
    def untouched(self, *inputs: Any) -> Iterator[None]:
        """Record a rule for each tensor of `inputs` that was edited inside."""
        before = [(name, tensor, tensor.detach().clone()) for name, tensor in tensors(*inputs)]
        yield
        for name, tensor, copy in before:
            same = tensor.shape == copy.shape and torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num())
            self.expect(same, f"edits its input {name} in place")

    def finish(self) -> None:
        """Raise ConformanceError when a rule was broken."""
        if self.failures:
            raise ConformanceError(self.subject, self.failures)


def tensors(*values: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of dataclasses, tuples and plain tensors, with a name."""
    for value in values:
        if isinstance(value, Tensor):
            yield "tensor", value
        elif isinstance(value, tuple):
            yield from tensors(*value)
        elif is_dataclass(value):
            for field in fields(value):
                for _, tensor in tensors(getattr(value, field.name)):
                    yield f"{type(value).__name__}.{field.name}", tensor


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to `tolerance`, NaN with NaN; False for other shapes."""
    return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def permute(value: T, order: Tensor) -> T:
    """Return the rollouts of a dataclass (or tensor, or tuple) in another order; what is not per rollout stays."""
    n = len(order)
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value[order] if value.dim() and len(value) == n else value
    elif isinstance(value, tuple):
        moved = tuple(value[i] for i in order.tolist()) if len(value) == n else tuple(permute(v, order) for v in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{f.name: permute(getattr(value, f.name), order) for f in fields(value)})
    result: T = moved
    return result


def pad(value: T, length: int, columns: int) -> T:
    """Return a dataclass (or tensor) whose [N, `length`, ...] tensors have `columns` more positions of padding."""
    padded: Any = value
    if isinstance(value, Tensor):
        if value.dim() >= 2 and value.shape[1] == length:
            padded = torch.cat([value, value.new_zeros(len(value), columns, *value.shape[2:])], dim=1)
    elif is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if isinstance(getattr(value, f.name), Tensor)]
        padded = replace(value, **{name: pad(getattr(value, name), length, columns) for name in names})
    result: T = padded
    return result
