"""Policy-gradient losses and the ratios they clip. All per token, to be minimised."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distillkit.errors import ConfigError, problem

__all__ = [
    "ClampGradient",
    "clipped_policy_loss",
    "clipped_weight_loss",
    "dual_clip",
    "importance_weights",
    "sequence_log_ratio",
    "teacher_evidence",
    "trrd_log_ratio",
]

ClampGradient = Literal["differentiable", "through", "detached"]


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return −min(r·Â, clip(r, 1−clip_low, 1+clip_high)·Â), r = exp(log_ratio).

    See *Proximal Policy Optimization Algorithms*, Schulman et al., 2017, https://arxiv.org/abs/1707.06347 (eq. 7); two
    bounds: *DAPO*, Yu et al., 2025, https://arxiv.org/abs/2503.14476 (eq. 8).

    Args:
        log_ratio: [...] carries gradient.
        advantages: [...] detached.
        clip_low: how far below 1 the ratio may count, in [0, 1].
        clip_high: how far above 1.

    Example:
        >>> clipped_policy_loss(torch.tensor([2.0]).log(), torch.tensor([1.0]), 0.2, 0.28).item()
        -1.2799999713897705
    """
    # Beyond 88 nats exp is infinite. Where Â ≥ 0 such a ratio does not count (the clip took its gradient long before),
    # but 0 · ∞ would make the gradient NaN.
    ratio = torch.where(advantages >= 0, log_ratio.clamp(max=80.0), log_ratio).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def dual_clip(loss: Tensor, advantages: Tensor, bound: float) -> Tensor:
    """Return the loss capped at −bound·Â where Â < 0, so that a large ratio cannot push without limit.

    See *Mastering Complex Control in MOBA Games with Deep Reinforcement Learning*, Ye et al., 2020,
    https://arxiv.org/abs/1912.09729 (eq. 5).

    Example:
        >>> dual_clip(torch.tensor([9.0]), torch.tensor([-1.0]), bound=3.0).item()
        3.0
    """
    return torch.where(advantages < 0, torch.minimum(loss, -bound * advantages), loss)


def clipped_weight_loss(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Return −sg[clip(r, 1−clip_low, 1+clip_high)]·Â·log π_θ: the clip bounds a token's weight, not its gradient.

    See *MiniMax-M1*, MiniMax, 2025, https://arxiv.org/abs/2506.13585 (CISPO, eq. 4 and 5).

    Args:
        log_ratio: [...] log r; its gradient is not used.
        logprobs: [...] log π_θ of the sampled tokens; carries gradient.
        advantages: [...] detached.
        clip_low: how far below 1 the weight may fall; 1 is no bound.
        clip_high: how far above 1 it may rise.

    Example:
        >>> clipped_weight_loss(torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([2.0]), 1.0, 0.5).item()
        3.0
    """
    weight = log_ratio.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logprobs


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return log s on every token of `mask`, s = (π_θ(y)/π_old(y))^(1/|y|), with the gradient of the token alone.

    log s_t = sg[mean_t (log π_θ − log π_old)] + log π_θ(y_t) − sg[log π_θ(y_t)]. The mean is taken in float64: its clip
    is a few 1e-4 wide and |y| may be tens of thousands.

    See *Group Sequence Policy Optimization*, Zheng et al., 2025, https://arxiv.org/abs/2507.18071 (GSPO-token).

    Args:
        logprobs: [n, L]; carries gradient.
        old_logprobs: [n, L], detached.
        mask: [n, L] bool, the tokens of y; |y| counts them.

    Returns:
        [n, L], 0 off `mask`.

    Example:
        >>> new, old = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
        >>> sequence_log_ratio(new, old, torch.tensor([[True, True, False]])).tolist()
        [[-0.25, -0.25, 0.0]]
    """
    moved = torch.where(mask, (logprobs - old_logprobs).detach(), 0.0).double()
    mean = moved.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean.to(logprobs.dtype) + (logprobs - logprobs.detach()), 0.0)


def teacher_evidence(teacher_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return exp(sign(Â)·d), d = log π_T − log π_old: above 1 where the teacher agrees with the sign of Â.

    The same shape comes back, detached; 1 where Â = 0. See arXiv 2609.04108, 2026, https://arxiv.org/abs/2609.04108.

    Example:
        >>> teacher, old = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0])
        >>> [round(e, 4) for e in teacher_evidence(teacher, old, torch.tensor([0.5, -0.5])).tolist()]
        [2.7183, 0.3679]
    """
    agreement = advantages.sign() * (teacher_logprobs - old_logprobs).detach()
    return torch.where(advantages == 0, 0.0, agreement).exp()  # 0 · ∞ where the teacher rules a token out


def trrd_log_ratio(
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    alpha: float,
    clamp: float | None = 1.0,
    clamp_grad: ClampGradient = "differentiable",
    *,
    distil_logprobs: Tensor | None = None,
) -> Tensor:
    """Return log r = α·(log π_θ − log π_old) + (1−α)·clamp(log π_θ − log π_T, ±clamp).

    See *Reinforcement-aware Knowledge Distillation for LLM Reasoning*, Zhang et al., 2026,
    https://arxiv.org/abs/2602.22495 (eq. 3; the clamp is in appendix B). The paper's text and its formula disagree on
    the direction of α; the formula counts: α = 1 is GRPO. It does not say whether gradient passes the clamp:
    `clamp_grad` chooses.

    Args:
        student_logprobs: [...] at the sampling temperature; carries gradient.
        old_logprobs: [...] at the sampling temperature, detached.
        teacher_logprobs: [...] at the distil temperature, detached.
        alpha: exponent of the old policy in the denominator, in [0, 1].
        clamp: bound on the teacher's log-ratio in nats; None is unbounded.
        clamp_grad: `differentiable` is a plain clamp (no gradient from the teacher term where it binds), `through` the
            clamped value with the unclamped gradient, `detached` no gradient through the teacher term at all.
        distil_logprobs: [...] the student's at the distil temperature, when that differs; carries gradient.

    Raises:
        ConfigError: `clamp_grad` is none of the three.
    """
    gap = (student_logprobs if distil_logprobs is None else distil_logprobs) - teacher_logprobs
    clamped = gap if clamp is None else gap.clamp(-clamp, clamp)
    if clamp_grad == "through":
        clamped = gap - gap.detach() + clamped.detach()
    elif clamp_grad == "detached":
        clamped = clamped.detach()
    elif clamp_grad != "differentiable":
        expected = "differentiable, through or detached"
        raise ConfigError(problem("trrd_log_ratio: clamp_grad", got=repr(clamp_grad), expected=expected))
    return alpha * (student_logprobs - old_logprobs) + (1 - alpha) * clamped


def importance_weights(old_logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """Return min(π_old / π_behaviour, cap) per token, detached; 1 where the behaviour log-prob is unknown (NaN).

    Corrects rollouts of an engine whose numbers differ from the trainer's. See *Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training*, Yao et al., 2025, https://fengyao.notion.site/off-policy-rl (truncated weights).

    Example:
        >>> importance_weights(torch.tensor([0.0, 0.0]), torch.tensor([-3.0, torch.nan]), cap=2.0).tolist()
        [2.0, 1.0]
    """
    ratio = (old_logprobs - behaviour_logprobs).detach().exp().clamp(max=cap)
    return torch.where(behaviour_logprobs.isnan(), torch.ones_like(ratio), ratio)
