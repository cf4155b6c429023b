"""The student's own base weights as teacher, without a second copy of them."""

from __future__ import annotations

import copy
from typing import Any, cast

from distillkit.backbone import Batching, LMHead
from distillkit.components import StudentBase, StudentInfo, TeacherScorer
from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.teachers.scoring import score_rollouts
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["AdapterOffTeacher"]


class AdapterOffTeacher(TeacherScorer):
    """The student of a LoRA run with its adapters switched off: the model that it was before training.

    Its use is as `model.reference`, to stay near to, or as the base of `extrapolated`. It costs a forward and no
    memory for weights. Scores are those of `local` with the student's checkpoint and dtype.

    Args:
        tokens_per_batch: token budget of one forward, padding included.
        batching: rollouts of a forward in one packed row, or padded: sorted by length or in_order.
        head_chunk: token positions per head call; None keeps a chunk's logits near 64 MiB on a CPU, 256 MiB elsewhere,
            and on a CPU goes over the vocabulary instead, all positions at once, where sums over it are enough.

    Raises:
        ConfigError: at setup, when the student has no adapters.

    Adapters are switched off in the student itself while this scores: nothing else may use it meanwhile.
    """

    def __init__(
        self, *, tokens_per_batch: int = 16384, batching: Batching = "packed", head_chunk: int | None = None
    ) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.batching = batching
        self.head_chunk = head_chunk
        self._base: StudentBase | None = None
        self._limit = 0

    @property
    def offers(self) -> ScoreRequest:
        return ScoreRequest(sampled=True, topk=2**31, student_topk=2**31, full=True, entropy=True)

    def setup(self, student: StudentInfo) -> None:
        if student.base is None:
            where = "model: adapter_off scores with the student's base weights, and this student is trained whole"
            got = "model.lora: null"
            hint = "model.lora: {rank: 16}, or {name: local, path: <model.student>} for a second copy"
            raise ConfigError(problem(where, got=got, expected="a student with LoRA", hint=hint))
        self._base, self._limit = student.base, student.vocab_limit

    def teardown(self) -> None:
        self._base = None

    def identity(self) -> str:
        return f"adapter_off:{self._known().identity}"

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        with self._known().whole() as student, (model := cast(Any, student.model)).disable_adapter():
            return score_rollouts(
                model,
                _base_head(model),
                rollouts,
                request,
                vocab_limit=self._limit,
                tokens_per_batch=self.tokens_per_batch,
                batching=self.batching,
                head_chunk=self.head_chunk,
            )

    def _known(self) -> StudentBase:
        if self._base is None:
            hint = "call setup(student) first"
            raise ScoringError(problem("AdapterOffTeacher", got="used before setup", hint=hint))
        return self._base


def _base_head(model: Any) -> LMHead:
    """The head without its adapter, and with the weights that it has now: those of a gathered student are let go."""
    head = model.get_base_model().get_output_embeddings()
    layer = copy.copy(getattr(head, "base_layer", head))
    vars(layer)["_parameters"] = dict(layer._parameters)
    return LMHead(model, layer=layer)
