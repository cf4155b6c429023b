"""A whole, plain student beside a sharded one: what samples and what is exported.

Sharded modules gather their weights with every forward. Ranks whose rollouts differ in length call forward a different
number of times, and would wait for each other for ever. So the weights are gathered once, into a copy without hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distillkit.scorer import StudentScorer

__all__ = ["filled", "skeleton"]


def skeleton(scorer: StudentScorer) -> StudentScorer:
    """Return a copy of the student that has no weights (its parameters are on `meta`), before hooks are put on it."""
    empty: dict[int, nn.Parameter] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in scorer.parameters()
    }
    return copy.deepcopy(scorer, memo=empty)


@contextmanager
def filled(
    empty: StudentScorer, sharded: nn.Module, gather: Callable[[nn.Parameter], Tensor]
) -> Iterator[StudentScorer]:
    """Give the skeleton the weights of `sharded` while the context lasts; every rank has to enter.

    Args:
        empty: what `skeleton` made of the same student.
        sharded: the student whose parameters lie in shards.
        gather: returns the whole of one parameter, on every rank, as a tensor of its own.
    """
    weightless = {name: p for name, p in empty.named_parameters(remove_duplicate=False)}
    tied: dict[int, nn.Parameter] = {}
    try:
        whole = {name: gather(p) for name, p in sharded.named_parameters()}
        for name, tensor in whole.items():
            tied[id(weightless[name])] = nn.Parameter(tensor, requires_grad=False)
        for name, parameter in weightless.items():
            _put(empty, name, tied[id(parameter)])
        yield empty
    finally:
        for name, parameter in weightless.items():
            _put(empty, name, parameter)


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    root.get_submodule(path).register_parameter(own, parameter)


def detached(tensor: Tensor) -> Tensor:
    """Return a copy that shares nothing with `tensor`."""
    return torch.clone(tensor.detach())
