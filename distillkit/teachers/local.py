"""A teacher that lives in this process."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ScoringError, problem
from distillkit.functional.logprobs import entropy, log_softmax, scatter_tokens, token_logprobs
from distillkit.functional.packing import micro_batches
from distillkit.models import (
    Dtype,
    LMHead,
    chunk_rows,
    fingerprint,
    load_causal_lm,
    model_vocab_size,
    predicting_states,
)
from distillkit.teachers._tokenizer import Tolerated, uncounted_end_ids
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["LocalTeacher"]


class LocalTeacher(TeacherScorer):
    """A frozen causal language model that scores rollouts in this process, in its own dtype.

    Whole distributions are not stored: the hidden states that predict the completion are kept, and the divergence
    projects them through the teacher's head chunk by chunk.

    Args:
        path: local checkpoint folder, hub name, or `embedded:teacher`.
        dtype: of the weights; `auto` is the checkpoint's.
        tokens_per_batch: token budget of one forward, padding included.
        head_chunk: token positions per head call; None keeps a chunk's logits near 256 MiB.
        tolerate: differences from the student's tokenizer to accept: `chat_template`, or `eos` (end tokens that differ
            are then left out of the teacher's signal). Differing token ids are never accepted.

    Raises:
        ModelError: at setup, when the checkpoint does not load or its tokenizer does not fit the student's.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Dtype = "auto",
        tokens_per_batch: int = 16384,
        head_chunk: int | None = None,
        tolerate: tuple[Tolerated, ...] = (),
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.tokens_per_batch = tokens_per_batch
        self.head_chunk = head_chunk
        self.tolerate = tuple(tolerate)
        self._model: PreTrainedModel | None = None
        self._student: StudentInfo | None = None
        self._masked_ids: tuple[int, ...] = ()

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True, topk=2**31, student_topk=2**31, full=True, entropy=True)

    @property
    def vocab_size(self) -> int:
        return model_vocab_size(self.path, where="model.teacher.path")

    def setup(self, student: StudentInfo) -> None:
        self._masked_ids = uncounted_end_ids(self.path, student, self.tolerate)
        self._student = student
        model = load_causal_lm(self.path, where="model.teacher.path", dtype=self.dtype)
        self._model = model.eval().requires_grad_(False).to(student.device)

    def teardown(self) -> None:
        self._model = None

    def identity(self) -> str:
        return f"local:{fingerprint(self.path)}:{self.dtype}"

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        if self._model is None or self._student is None:
            raise ScoringError(
                problem("LocalTeacher.score", got="called before setup", hint="call setup(student) first")
            )
        model, limit = self._model, self._student.vocab_limit
        head = LMHead(model)
        shape, device = rollouts.tokens.shape, rollouts.tokens.device
        k = min(request.topk, limit)
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        sampled = torch.zeros(shape, dtype=wide, device=device) if request.sampled else None
        spread = torch.zeros(shape, dtype=wide, device=device) if request.entropy else None
        topk = torch.zeros(*shape, k, dtype=wide, device=device) if k else None
        topk_ids = torch.zeros(*shape, k, dtype=torch.long, device=device) if k else None
        hidden: list[Tensor] = [torch.empty(0)] * len(rollouts)
        rows = chunk_rows(limit, self.head_chunk)
        for positions in micro_batches(rollouts.lengths.tolist(), self.tokens_per_batch):
            index = torch.tensor(positions, device=device)
            part = rollouts.select(index)
            length, mask = part.tokens.shape[1], part.loss_mask
            with torch.inference_mode():
                states = predicting_states(model, part)
            # Tensors made in inference mode cannot enter autograd; a clone made outside it can.
            states = states.clone()
            if request.needs_distribution:
                for i, own in zip(positions, states.split(mask.sum(dim=1).tolist()), strict=True):
                    hidden[i] = own
            if sampled is None and topk is None and spread is None:
                continue
            targets = part.tokens[mask]
            found = [
                _chunk(head(states[i : i + rows])[:, :limit], targets[i : i + rows], request, k)
                for i in range(0, len(targets), rows)
            ]
            for grid, column in zip((sampled, topk, topk_ids, spread), zip(*found, strict=True), strict=False):
                if grid is not None:
                    grid[index, :length] = scatter_tokens(torch.cat([c for c in column if c is not None]), mask)
        valid = rollouts.loss_mask
        if self._masked_ids:
            masked = torch.tensor(self._masked_ids, device=device)
            valid = valid & ~torch.isin(rollouts.tokens, masked)
        return TeacherScores(
            valid=valid,
            sampled=sampled,
            topk_ids=topk_ids,
            topk=topk,
            entropy=spread,
            hidden=tuple(hidden) if request.needs_distribution else None,
            head=head if request.needs_distribution else None,
        )


@torch.no_grad()
def _chunk(logits: Tensor, targets: Tensor, request: ScoreRequest, k: int) -> tuple[Tensor | None, ...]:
    """Sampled log-probs [m], top-k log-probs and ids [m, K], entropies [m] of one chunk of logits [m, V]."""
    temperature = request.temperature
    sampled = token_logprobs(logits, targets, temperature) if request.sampled else None
    best = log_softmax(logits, temperature).topk(k, dim=-1) if k else None
    spread = entropy(logits, temperature) if request.entropy else None
    return sampled, None if best is None else best.values, None if best is None else best.indices, spread
