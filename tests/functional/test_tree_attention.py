"""Attention over packed groups, against one dense mask and against each rollout on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distillkit.functional.tree_attention import Branches, tree_attention

GROUPS = [(3, (4, 1, 2, 2, 3)), (5, (6,)), (2, ()), (3, (3, 3))]
"""Prompt length, completion lengths: several, one and no completions; neighbours of one length, one a prompt."""


def packed(groups: list[tuple[int, tuple[int, ...]]]) -> tuple[Branches, Tensor]:
    """The branches and, written independently token by token, the mask [S, S] that they stand for."""
    causal, shared, origin = [], [], []
    for g, (prompt, completions) in enumerate(groups):
        first = len(origin)
        origin += [(g, -1)] * prompt
        causal.append((first, len(origin)))
        for c, length in enumerate(completions):
            causal.append((len(origin), len(origin) + length))
            origin += [(g, c)] * length
        if completions:
            shared.append((first + prompt, len(origin), first, first + prompt))
    mask = torch.zeros(len(origin), len(origin), dtype=torch.bool)
    for i, (group, completion) in enumerate(origin):
        for j in range(i + 1):
            mask[i, j] = origin[j] in {(group, -1), (group, completion)}
    return Branches(causal=tuple(causal), shared=tuple(shared)), mask


def inputs(length: int, heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, length, 8), (1, key_heads, length, 8), (1, key_heads, length, 8)]
    return [torch.randn(shape, dtype=dtype).mul_(2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_and_gradients_are_those_of_the_dense_mask(key_heads: int, scale: float | None) -> None:
    branches, mask = packed(GROUPS)
    ours, theirs = inputs(len(mask), 4, key_heads, torch.float64), inputs(len(mask), 4, key_heads, torch.float64)
    weight = torch.randn(1, 4, len(mask), 8, dtype=torch.float64)
    got = tree_attention(*ours, branches, scale)
    repeated = [theirs[0], *(t.repeat_interleave(4 // key_heads, dim=1) for t in theirs[1:])]
    want = scaled_dot_product_attention(*repeated, attn_mask=mask, scale=scale)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(got, want)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_gradient_against_finite_differences() -> None:
    branches, mask = packed([(2, (2, 1))])
    assert torch.autograd.gradcheck(lambda *qkv: tree_attention(*qkv, branches), inputs(len(mask), 2, 1, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_near_to_float64_as_one_dense_call_is(dtype: torch.dtype) -> None:
    branches, mask = packed(GROUPS)
    low = inputs(len(mask), 2, 2, dtype)
    want = tree_attention(*(t.detach().double() for t in low), branches)
    got, dense = tree_attention(*low, branches), scaled_dot_product_attention(*low, attn_mask=mask)
    assert got.dtype == dtype
    assert (got.double() - want).norm() < 2 * (dense.double() - want).norm()


def test_scores_far_apart_do_not_overflow() -> None:
    """The prompt's keys outweigh the completion's by e^200 and the other way round."""
    branches = Branches(causal=((0, 1), (1, 2)), shared=((1, 2, 0, 1),))
    value = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
    for keys, want in (([200.0, 0.0], 1.0), ([0.0, 200.0], 2.0)):
        key = torch.tensor(keys).reshape(1, 1, 2, 1)
        assert tree_attention(torch.ones(1, 1, 2, 1), key, value, branches)[0, 0, 1, 0].item() == want


def test_a_second_derivative_is_refused_not_wrong() -> None:
    branches, mask = packed([(2, (2,))])
    query, key, value = inputs(len(mask), 1, 1, torch.float64)
    (first,) = torch.autograd.grad(tree_attention(query, key, value, branches).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
