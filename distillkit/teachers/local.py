"""A teacher that lives in this process."""

from __future__ import annotations

from transformers import PreTrainedModel

from distillkit.backbone import Batching, LMHead
from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ScoringError, problem
from distillkit.models import Dtype, fingerprint, load_causal_lm, model_vocab_size
from distillkit.teachers._tokenizer import Tolerated, uncounted_end_ids
from distillkit.teachers.scoring import score_rollouts
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
        batching: rollouts of a forward in one packed row, or padded: sorted by length or in_order.
        head_chunk: token positions per head call; None keeps a chunk's logits near 64 MiB on a CPU, 256 MiB elsewhere,
            and on a CPU goes over the vocabulary instead, all positions at once, where sums over it are enough.
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
        batching: Batching = "packed",
        head_chunk: int | None = None,
        tolerate: tuple[Tolerated, ...] = (),
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.tokens_per_batch = tokens_per_batch
        self.batching = batching
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
        return score_rollouts(
            self._model,
            LMHead(self._model),
            rollouts,
            request,
            vocab_limit=self._student.vocab_limit,
            tokens_per_batch=self.tokens_per_batch,
            batching=self.batching,
            head_chunk=self.head_chunk,
            unscored_ids=self._masked_ids,
        )
