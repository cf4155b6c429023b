"""Conformance of teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.testing.constructor import check_common
from distillkit.testing.fakes import rollout_batch, student_info
from distillkit.testing.findings import Findings, close, pad, permute, tensors
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["check_teacher"]

_TOLERANCE = 1e-4
"""A model's log-probs move by rounding when a batch is put together differently."""


def check_teacher(
    part: TeacherScorer,
    *,
    rollouts: RolloutBatch | None = None,
    student: StudentInfo | None = None,
    any_tokens: bool = True,
) -> None:
    """Check a teacher: scores of the tokens themselves, each from its prefix alone, without gradient.

    Args:
        part: the teacher, not yet set up.
        rollouts: what to score, in the student's token ids.
        student: the student it is set up for.
        any_tokens: whether it can score rollouts that it was not given here (a recording cannot).

    Raises:
        ConformanceError: with every broken rule.
    """
    findings = Findings(part)
    check_common(findings, part)
    rollouts = rollout_batch(observation="#") if rollouts is None else rollouts
    student = student_info() if student is None else student
    with findings.rule("setup"):
        part.setup(student)
    try:
        with findings.rule("offers and identity"):
            findings.expect(bool(part.offers), "offers nothing")
            name = part.identity()
            findings.expect(isinstance(name, str) and name, "identity is empty")
            findings.expect(part.identity() == name, "identity changes between calls")
            findings.expect(part.vocab_size is None or part.vocab_size >= 1, "vocab_size is below 1")
        sound = len(findings.failures)
        for request in _requests(part.offers):
            with findings.rule(f"score({request})"):
                with findings.untouched(rollouts):
                    scores = part.score(rollouts, request)
                _shapes(findings, scores, rollouts, request)
                if len(findings.failures) == sound:
                    _content(findings, scores, rollouts, request, student.vocab_limit)
                    _arrangements(findings, part, rollouts, request, scores)
                    if any_tokens and request.sampled:
                        _alignment(findings, part, rollouts, scores, student.vocab_limit)
    finally:
        part.teardown()
    findings.finish()


def _requests(offers: ScoreRequest) -> Iterator[ScoreRequest]:
    """Each thing it offers, with the sampled log-prob to compare it with, and all at once."""
    single = {
        "sampled": offers.sampled,
        "topk": min(offers.topk, 3),
        "full": offers.full,
        "entropy": offers.entropy,
    }
    for name, value in single.items():
        if value:
            yield ScoreRequest(sampled=offers.sampled) | ScoreRequest(**{name: value})  # type: ignore[arg-type]
    yield ScoreRequest(sampled=offers.sampled, topk=single["topk"], full=offers.full, entropy=offers.entropy)


def _shapes(findings: Findings, scores: TeacherScores, rollouts: RolloutBatch, request: ScoreRequest) -> None:
    n, length = rollouts.tokens.shape
    for name, there, shape in (
        ("sampled", request.sampled, [n, length]),
        ("topk", request.topk > 0, [n, length, request.topk]),
        ("topk_ids", request.topk > 0, [n, length, request.topk]),
        ("entropy", request.entropy, [n, length]),
    ):
        value = getattr(scores, name)
        if not there or not findings.expect(value is not None, f"{name} was asked for and is missing"):
            findings.expect(there or value is None or name == "sampled", f"{name} was not asked for and is kept")
            continue
        findings.expect(list(value.shape) == shape, f"{name} is {list(value.shape)}, not {shape}")
        kinds = (torch.int64,) if name == "topk_ids" else (torch.float32, torch.float64)
        findings.expect(value.dtype in kinds, f"{name} is {value.dtype}")
    findings.expect(scores.valid.dtype == torch.bool, f"valid is {scores.valid.dtype}, not bool")
    if findings.expect(list(scores.valid.shape) == [n, length], f"valid is {list(scores.valid.shape)}, not [N, L]"):
        findings.expect(not (scores.valid & ~rollouts.loss_mask).any(), "valid reaches beyond loss_mask")
        findings.expect(scores.valid.any(), "no position is valid")
    if request.full:
        own = [] if scores.hidden is None else [len(states) for states in scores.hidden]
        want = rollouts.loss_mask.sum(dim=1).tolist()
        findings.expect(own == want, f"hidden has {own} states per rollout, not {want}")
        findings.expect(scores.head is not None, "hidden states come without a head")
    else:
        findings.expect(scores.hidden is None, "hidden states were not asked for and are kept")
    findings.expect(not any(t.requires_grad for _, t in tensors(scores)), "scores carry gradient")
    findings.expect(not any(t.is_inference() for _, t in tensors(scores)), "scores are inference tensors: clone them")


def _content(
    findings: Findings, scores: TeacherScores, rollouts: RolloutBatch, request: ScoreRequest, limit: int
) -> None:
    valid, sampled = scores.valid, scores.sampled
    if sampled is not None:
        findings.expect(sampled[valid].isfinite().all(), "a log-prob is not finite at a valid position")
        findings.expect((sampled[valid] <= 1e-5).all(), "a log-prob is above 0")
    if scores.topk is not None and scores.topk_ids is not None:
        ids, logprobs = scores.topk_ids[valid], scores.topk[valid]
        findings.expect((ids >= 0).all() and (ids < limit).all(), "topk_ids reach beyond vocab_limit")
        findings.expect(all(len(set(row)) == len(row) for row in ids.tolist()), "topk_ids repeat at a position")
        findings.expect((logprobs.exp().sum(-1) <= 1 + _TOLERANCE).all(), "topk log-probs add up to more than 1")
        if sampled is not None:
            hit = ids == rollouts.tokens[valid].unsqueeze(-1)
            own = sampled[valid].unsqueeze(-1).expand_as(logprobs)
            findings.expect(close(logprobs[hit], own[hit], _TOLERANCE), "topk and sampled differ at the same token")
    if scores.entropy is not None:
        spread = scores.entropy[valid]
        text = "an entropy is negative or not finite"
        findings.expect((spread >= -_TOLERANCE).all() and spread.isfinite().all(), text)
    if scores.hidden is not None and scores.head is not None:
        logits = scores.head(torch.cat(list(scores.hidden)))
        findings.expect(logits.dtype in (torch.float32, torch.float64), f"head gives {logits.dtype}, not float32")
        findings.expect(logits.dim() == 2 and logits.shape[1] >= limit, f"head gives {list(logits.shape)}, not [M, V]")
        logprobs = (logits[:, :limit] / request.temperature).log_softmax(-1)[valid[rollouts.loss_mask]]
        if sampled is not None:
            own = logprobs.gather(-1, rollouts.tokens[valid].unsqueeze(-1)).squeeze(-1)
            findings.expect(close(own, sampled[valid], _TOLERANCE), "head(hidden) and sampled differ at the same token")
        if scores.entropy is not None:
            spread = -(logprobs.exp() * logprobs).sum(-1)
            findings.expect(close(spread, scores.entropy[valid], _TOLERANCE), "head(hidden) and entropy differ")


def _arrangements(
    findings: Findings, part: TeacherScorer, rollouts: RolloutBatch, request: ScoreRequest, scores: TeacherScores
) -> None:
    length, order = rollouts.tokens.shape[1], torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0))
    again = part.score(rollouts, request)
    findings.expect(_same(again, scores, 1e-6), "scores change from call to call")
    moved = part.score(permute(rollouts, order), request)
    text = "a score depends on the place of the rollout in the batch"
    findings.expect(_same(moved, permute(scores, order), _TOLERANCE), text)
    wider = part.score(pad(rollouts, length, 3), request)
    findings.expect(_same(wider, pad(scores, length, 3), _TOLERANCE), "a score depends on the padding")


def _alignment(
    findings: Findings, part: TeacherScorer, rollouts: RolloutBatch, scores: TeacherScores, limit: int
) -> None:
    """Change the last sampled token of the first rollout: no earlier score may move, its own has to."""
    last = int(rollouts.loss_mask[0].nonzero()[-1])
    for step in range(1, limit, max(limit // 16, 1)):  # a teacher may well find several tokens equally likely
        tokens = rollouts.tokens.clone()
        tokens[0, last] = (tokens[0, last] + step) % limit
        other = part.score(replace(rollouts, tokens=tokens), ScoreRequest(sampled=True))
        if scores.sampled is None or other.sampled is None or not (scores.valid & other.valid)[0, last]:
            continue
        both = (scores.valid & other.valid)[0, :last]
        before, after = scores.sampled[0, :last][both], other.sampled[0, :last][both]
        findings.expect(close(after, before, _TOLERANCE), "a score depends on later tokens: shifted by one?")
        if not close(other.sampled[0, last], scores.sampled[0, last], 1e-6):
            return
    findings.expect(False, "the score at a position does not depend on the token there: shifted by one?")


def _same(got: TeacherScores, want: TeacherScores, tolerance: float) -> bool:
    if not torch.equal(got.valid, want.valid):
        return False

    def grid(scores: TeacherScores, name: str) -> Tensor | None:
        value: Tensor | None = getattr(scores, name)
        return None if value is None else value[scores.valid]

    for name in ("sampled", "topk", "entropy"):
        ours, theirs = grid(got, name), grid(want, name)
        if ours is None or theirs is None:
            if ours is not theirs:
                return False
        elif not close(ours, theirs, tolerance):
            return False
    return True
