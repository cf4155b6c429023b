"""Per-token divergences between student and teacher. Nats/token; gradient flows into the student's argument.

The sampled estimators see the log-prob of one token drawn from the student. With `d = log π_T − log π_θ` at that token:

| name | value | as a value, on-policy | expected gradient as a loss, on-policy |
|---|---|---|---|
| `k1` | −d | unbiased for KL(π_θ‖π_T) | exactly 0: use it as an advantage |
| `k2` | d²/2 | biased, low variance | ∇KL(π_θ‖π_T), reverse KL |
| `k3` | e^d − d − 1 | unbiased, ≥ 0 | ∇KL(π_T‖π_θ), forward KL |

See *Approximating KL Divergence*, John Schulman, 2020, http://joschu.net/blog/kl-approx.html.

Sums over the vocabulary take 0·log 0 as 0, so a token that is impossible on both sides (logit −inf) counts for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillkit.errors import ConfigError, problem
from distillkit.functional.logprobs import log_softmax, widen

__all__ = [
    "bounded_k2",
    "forward_kl",
    "jsd",
    "k1",
    "k2",
    "k3",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "todi",
    "topk_forward_kl",
    "topk_reverse_kl",
]


def k1(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return log π_θ − log π_T at the sampled token. Any shape; the same shape comes back.

    Example:
        >>> k1(torch.tensor([-1.0]), torch.tensor([-3.0])).item()
        2.0
    """
    return student_logprobs - teacher_logprobs


def k2(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return ½ (log π_θ − log π_T)² at the sampled token.

    Example:
        >>> k2(torch.tensor([-1.0]), torch.tensor([-3.0])).item()
        2.0
    """
    return 0.5 * (student_logprobs - teacher_logprobs).square()


def bounded_k2(student_logprobs: Tensor, teacher_logprobs: Tensor, bound: float) -> Tensor:
    """Return k2 whose gradient in log π_θ is clamped to ±`bound`: a Huber function of the log-ratio.

    ½ d² where |d| ≤ bound, bound·(|d| − ½ bound) beyond. A token the teacher finds near-impossible keeps a gradient;
    clamping the value instead would remove it from exactly that token.

    Example:
        >>> bounded_k2(torch.tensor([0.0]), torch.tensor([-15.0]), bound=5.0).item()
        62.5
    """
    gap = student_logprobs - teacher_logprobs
    return torch.nn.functional.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=bound)


def k3(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return e^d − d − 1 with d = log π_T − log π_θ at the sampled token; ≥ 0.

    Example:
        >>> round(k3(torch.tensor([0.0]), torch.tensor([1.0])).item(), 4)
        0.7183
    """
    d = teacher_logprobs - student_logprobs
    return torch.expm1(d) - d


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(π_T‖π_θ) = Σ_v π_T (log π_T − log π_θ). [..., V] and [..., V] → [...].

    Example:
        >>> forward_kl(torch.zeros(1, 2), torch.zeros(1, 2)).item()
        0.0
    """
    return _kl(teacher_logits, student_logits)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(π_θ‖π_T) = Σ_v π_θ (log π_θ − log π_T). [..., V] and [..., V] → [...].

    Example:
        >>> reverse_kl(torch.zeros(1, 2), torch.zeros(1, 2)).item()
        0.0
    """
    return _kl(student_logits, teacher_logits)


def jsd(student_logits: Tensor, teacher_logits: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence w·KL(π_T‖m) + (1−w)·KL(π_θ‖m), m = w·π_T + (1−w)·π_θ.

    See *On-Policy Distillation of Language Models*, Agarwal et al., 2023, https://arxiv.org/abs/2306.13649 (eq. 1).

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V].
        teacher_weight: w, strictly between 0 and 1. The formula is 0 at both ends; the limits JSD/w → forward KL (w →
            0) and JSD/(1−w) → reverse KL (w → 1) have their own functions.

    Raises:
        ConfigError: `teacher_weight` is not strictly between 0 and 1.
    """
    if not 0 < teacher_weight < 1:
        hint = "forward_kl" if teacher_weight <= 0 else "reverse_kl"
        expected = "0 < teacher_weight < 1"
        raise ConfigError(problem("jsd.teacher_weight", got=teacher_weight, expected=expected, hint=hint))
    student, teacher = _floored(student_logits), _floored(teacher_logits)
    mixture = _mixture(teacher, student, teacher_weight)
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(dim=-1)
    to_student = (student.exp() * (student - mixture)).sum(dim=-1)
    return teacher_weight * to_teacher + (1 - teacher_weight) * to_student


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.1) -> Tensor:
    """Return KL(π_T‖w·π_T + (1−w)·π_θ): the forward KL at w = 0, never above −log w. [..., V] and [..., V] → [...].

    See *DistiLLM: Towards Streamlined Distillation for Large Language Models*, Ko et al., 2024,
    https://arxiv.org/abs/2402.03898 (section 3.1).

    Raises:
        ConfigError: `weight` is not in [0, 1).

    Example:
        >>> round(skew_forward_kl(torch.tensor([-torch.inf, 0.0]), torch.tensor([0.0, -torch.inf]), 0.1).item(), 4)
        2.3026
    """
    if _share("skew_forward_kl", weight) == 0:
        return forward_kl(student_logits, teacher_logits)
    student, teacher = _floored(student_logits), _floored(teacher_logits)
    return (teacher.exp() * (teacher - _mixture(teacher, student, weight))).sum(dim=-1)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.1) -> Tensor:
    """Return KL(π_θ‖w·π_θ + (1−w)·π_T): the reverse KL at w = 0, never above −log w. [..., V] and [..., V] → [...].

    Gradient flows through both places where π_θ stands. See `skew_forward_kl` for the source.

    Raises:
        ConfigError: `weight` is not in [0, 1).
    """
    if _share("skew_reverse_kl", weight) == 0:
        return reverse_kl(student_logits, teacher_logits)
    student, teacher = _floored(student_logits), _floored(teacher_logits)
    return (student.exp() * (student - _mixture(student, teacher, weight))).sum(dim=-1)


def todi(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return Σ_v a·π_T (log π_T − log π_θ) + (1−a)·π_θ (log π_θ − log π_T), a = σ(log π_T − log π_θ) without gradient.

    Forward KL on the vocabulary entries that the student underrates, reverse KL on those it overrates. Since a·π_T −
    (1−a)·π_θ = π_T − π_θ, the *value* is the Jeffreys divergence KL(π_T‖π_θ) + KL(π_θ‖π_T); the gradient is not.

    See *ToDi: Token-wise Distillation via Fine-Grained Divergence Control*, Jung et al., 2025,
    https://arxiv.org/abs/2505.16297.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V].

    Returns:
        [...] nats/token.

    Example:
        >>> todi(torch.zeros(1, 2), torch.zeros(1, 2)).item()
        0.0
    """
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    nowhere = (student == -torch.inf) & (teacher == -torch.inf)
    gap = (teacher - student).detach().masked_fill(nowhere, 0.0)
    return _weighted_gap(teacher, student, gap.sigmoid()) + _weighted_gap(student, teacher, (-gap).sigmoid())


def topk_reverse_kl(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, tail: bool = True) -> Tensor:
    """Return KL(π_θ‖π_T) over K tokens and, with `tail`, one bucket for all the others. [..., K] → [...].

    With the bucket it is the KL of two coarsened distributions: ≥ 0 and a lower bound of the full KL. Without it the
    sum is truncated: no divergence, it can be negative and falls when the student moves mass out of the K tokens.

    Example:
        >>> p = torch.tensor([[0.5, 0.25]]).log()
        >>> topk_reverse_kl(p, p).item()
        0.0
    """
    return _topk(widen(student_topk_logprobs), widen(teacher_topk_logprobs), tail)


def topk_forward_kl(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, tail: bool = True) -> Tensor:
    """Return KL(π_T‖π_θ) over K tokens and, with `tail`, one bucket for all the others. [..., K] → [...].

    See `topk_reverse_kl` for what the bucket changes.
    """
    return _topk(widen(teacher_topk_logprobs), widen(student_topk_logprobs), tail)


def _kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    one, other = torch.broadcast_tensors(widen(logits), widen(other_logits))
    kind = torch.promote_types(one.dtype, other.dtype)
    value: Tensor = _KL.apply(one.to(kind), other.to(kind))  # type: ignore[no-untyped-call]
    return value


class _KL(torch.autograd.Function):
    """D = KL(p‖q) = Σ_v p (log p − log q) of two softmaxes, with 0·log 0 = 0.

    ∂D/∂(logit of p)_v = p_v (log p_v − log q_v − D) and ∂D/∂(logit of q)_v = q_v − p_v: two passes over [..., V], where
    autograd takes seven.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, other_logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, dim=-1)
        logq = torch.log_softmax(other_logits, dim=-1)
        gap = torch.sub(logp, logq, out=logq)
        p = torch.softmax(logits, dim=-1)
        value: Tensor = torch.linalg.vecdot(p, gap)
        if bool(value.isnan().any()):  # a rare case, and dear: p = 0 meets log 0
            value = torch.linalg.vecdot(p, gap.masked_fill_(logp == -torch.inf, 0.0))
        ctx.save_for_backward(p, gap, value, other_logits if ctx.needs_input_grad[1] else None)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, gap, value, other_logits = ctx.saved_tensors
        column = gradient.unsqueeze(-1)
        to_p = to_q = None
        if ctx.needs_input_grad[0]:
            to_p = gap.sub(value.unsqueeze(-1)).mul_(p).mul_(column)
        if ctx.needs_input_grad[1]:
            to_q = torch.softmax(other_logits, dim=-1).sub_(p).mul_(column)
        return to_p, to_q


def _weighted_gap(logp: Tensor, logq: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ_v w p (log p − log q) [...] with 0·log 0 = 0 and w = 1 unless given."""
    gap = (logp - logq).masked_fill_(logp == -torch.inf, 0.0)
    return (logp.exp() * (gap if weight is None else weight * gap)).sum(dim=-1)


def _floored(logits: Tensor) -> Tensor:
    # A finite floor, far below any log-prob that counts: the gradient of logaddexp(−inf, −inf) is NaN.
    return log_softmax(logits).clamp(min=-1e30)


def _mixture(logp: Tensor, logq: Tensor, weight: float) -> Tensor:
    """log(w·p + (1−w)·q), 0 < w < 1."""
    share = torch.tensor(weight, dtype=logp.dtype, device=logp.device)
    return torch.logaddexp(logp + share.log(), logq + torch.log1p(-share))


def _share(name: str, weight: float) -> float:
    if not 0 <= weight < 1:
        expected = "0 <= weight < 1 (at 1 the divergence is 0)"
        raise ConfigError(problem(f"{name}.weight", got=weight, expected=expected, hint="0.1"))
    return weight


def _topk(logp: Tensor, logq: Tensor, tail: bool) -> Tensor:
    kept = _weighted_gap(logp, logq)
    if not tail:
        return kept
    p_rest, q_rest = _tail_logprob(logp), _tail_logprob(logq)
    return kept + p_rest.exp() * (p_rest - q_rest)


def _tail_logprob(topk_logprobs: Tensor) -> Tensor:
    # Rounding can bring the sum of K probabilities to 1 or above; the bucket then holds one rounding unit.
    mass = topk_logprobs.exp().sum(dim=-1)
    return torch.log1p(-mass.clamp(max=1 - torch.finfo(mass.dtype).eps))
