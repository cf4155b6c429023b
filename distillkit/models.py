"""Load students and teachers, and score tokens through their real head without ever holding `[N, L, V]`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distillkit import embedded
from distillkit.components import DivergenceEstimator
from distillkit.errors import ModelError, problem
from distillkit.functional.logprobs import entropy, scatter_tokens, token_logprobs
from distillkit.types import RolloutBatch, StudentScores, TeacherScores, TokenScores

__all__ = [
    "Dtype",
    "LMHead",
    "ScorePlan",
    "StudentScorer",
    "chunk_rows",
    "enable_gradient_checkpointing",
    "end_token_ids",
    "fingerprint",
    "load_causal_lm",
    "load_tokenizer",
    "model_vocab_size",
    "predicting_states",
    "prepared",
    "vocab_mismatch",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_CHUNK_ELEMENTS = 2**26
"""Logits per head chunk when `head_chunk` is not set: 256 MiB in float32."""


def load_tokenizer(path: str, *, where: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local checkpoint folder, a hub name, or an `embedded:` model.

    Raises:
        ModelError: there is none, it has no end token, or it needs code from the checkpoint.
    """
    source = embedded.resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(_not_loadable(where, path, "a tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        hint = "set eos_token in its tokenizer_config.json"
        raise ModelError(problem(f"{where}: the tokenizer has no end token", got=path, hint=hint))
    if tokenizer.pad_token_id is None:
        # Padding is recognised by the attention mask, never by id, so the end token can pad.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str, *, where: str, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a causal language model from safetensors, with dropout 0; remote code is never run.

    Raises:
        ModelError: nothing there, not a causal language model, or a head that this module cannot reproduce.
    """
    source = embedded.resolve(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise ModelError(_not_loadable(where, path, "a causal language model in safetensors", error)) from error
    return prepared(model, where=where)


def prepared(model: PreTrainedModel, *, where: str) -> PreTrainedModel:
    """Return the model with dropout 0, its head checked: see `load_causal_lm`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            vars(module)["attention_dropout"] = 0.0
    _check_head(model, where)
    return model


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers' activations in the backward pass (non-reentrant)."""
    # transformers 5.20 renamed the method and warns about the old name.
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def model_vocab_size(path: str, *, where: str) -> int:
    """Return V of a checkpoint's output head, read from its config alone."""
    try:
        config = AutoConfig.from_pretrained(embedded.resolve(path), trust_remote_code=False)
    except Exception as error:
        raise ModelError(_not_loadable(where, path, "a model config", error)) from error
    return int(config.get_text_config().vocab_size)


def fingerprint(path: str) -> str:
    """Return a digest of a checkpoint folder: names, sizes and the first and last MiB of every file.

    A hub name that is not a local folder is its own digest.
    """
    folder = Path(embedded.resolve(path))
    if not folder.is_dir():
        return f"name:{path}"
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".jinja", ".model"}):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(size - 2**20, 0))
            digest.update(stream.read())
    return f"sha256:{digest.hexdigest()}"


def _not_loadable(where: str, path: str, wanted: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return problem(
        f"{where}: cannot load {wanted}",
        got=f"{path} ({reason})",
        expected="a local Hugging Face checkpoint folder, a hub name, or embedded:student / embedded:teacher",
    )


def _inner(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a peft wrapper (whose adapters are injected in place), or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    assert isinstance(inner, PreTrainedModel)
    return inner


class LMHead:
    """From hidden states [M, H] to logits [M, V] float32 through the model's own head.

    The head module is called (so bias and adapters count), then the config's logit scale and soft-capping. Calls
    follow the model's current weights; `layer` stands in for its head.
    """

    def __init__(self, model: nn.Module, *, layer: nn.Module | None = None) -> None:
        self._model, self._layer = _inner(model), layer
        config = self._model.config.get_text_config()
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        head = self._layer or self._model.get_output_embeddings()
        logits: Tensor = head(hidden.to(next(head.parameters()).dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def predicting_states(model: nn.Module, batch: RolloutBatch) -> Tensor:
    """Return the hidden states [M, H] that predict the `loss_mask` tokens of `batch`, in row-major order.

    No attention mask is passed: rollouts are right-padded and attention is causal, so no real token sees padding, and
    the kernels may take their fast causal path.
    """
    backbone = _inner(model).base_model
    assert isinstance(backbone, nn.Module)
    states: Tensor = backbone(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return states[:, :-1][batch.loss_mask[:, 1:]]


def chunk_rows(vocabulary: int, head_chunk: int | None) -> int:
    """Return the token positions per head chunk: `head_chunk`, or what keeps a chunk's logits near 256 MiB."""
    return head_chunk if head_chunk is not None else max(_CHUNK_ELEMENTS // vocabulary, 16)


@torch.no_grad()
def _check_head(model: PreTrainedModel, where: str) -> None:
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        whole = model(input_ids=ids, use_cache=False).logits.float()
        ours = LMHead(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception as error:
        what = f"{type(model).__name__} ({type(error).__name__}: {error})"
        raise ModelError(problem(f"{where}: cannot run the model's backbone and head apart", got=what)) from error
    finally:
        model.train(was_training)
    if not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
        gap = f"{type(model).__name__}: logits differ by up to {(whole - ours).abs().max().item():.3g}"
        expected = "a linear head, optionally with bias, logit_scale, logits_scaling or final_logit_softcapping"
        raise ModelError(problem(f"{where}: unsupported output head", got=gap, expected=expected))


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What one forward of the student computes for each token; `most_tokens` is the most that any rank sends."""

    sampling_temperature: float
    distil_temperature: float
    divergence: DivergenceEstimator | None = None
    reference_divergence: DivergenceEstimator | None = None
    entropy: bool = False
    most_tokens: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _FlatScores:
    """`TeacherScores` of a micro-batch at its M `loss_mask` positions."""

    valid: Tensor
    sampled: Tensor | None
    topk_ids: Tensor | None
    topk: Tensor | None
    hidden: Tensor | None
    scores: TeacherScores

    @staticmethod
    def of(scores: TeacherScores | None, mask: Tensor) -> _FlatScores | None:
        if scores is None:
            return None
        flat = {
            name: None if (value := getattr(scores, name)) is None else value[mask]
            for name in ("sampled", "topk_ids", "topk")
        }
        hidden = None if scores.hidden is None else torch.cat(list(scores.hidden))
        return _FlatScores(valid=scores.valid[mask], hidden=hidden, scores=scores, **flat)

    def rows(self, rows: slice) -> _FlatScores:
        cut: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("valid", "sampled", "topk_ids", "topk", "hidden")
        }
        return _FlatScores(scores=self.scores, **cut)

    @torch.no_grad()
    def logits(self, limit: int, temperature: float) -> Tensor:
        assert self.hidden is not None and self.scores.head is not None
        return self.scores.head(self.hidden)[:, :limit] / temperature


class StudentScorer(nn.Module):
    """The student: backbone and head, scored in chunks of token positions.

    Every training forward is a call of this module, so that a strategy that wraps it sees each one.

    Args:
        model: a causal language model (a peft wrapper is fine).
        vocab_limit: ids at or beyond it take part in no softmax.
        head_chunk: token positions per head call; None keeps a chunk's logits near 256 MiB.
    """

    def __init__(self, model: nn.Module, *, vocab_limit: int, head_chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.vocab_limit = vocab_limit
        self.head_chunk = head_chunk

    def forward(
        self,
        batch: RolloutBatch,
        plan: ScorePlan,
        teacher: TeacherScores | None = None,
        reference: TeacherScores | None = None,
    ) -> StudentScores:
        """Score the `loss_mask` tokens of `batch`; everything returned but the entropy carries gradient."""
        mask = batch.loss_mask
        hidden = predicting_states(self.model, batch)
        targets = batch.tokens[mask]
        head = LMHead(self.model)
        flat_teacher, flat_reference = _FlatScores.of(teacher, mask), _FlatScores.of(reference, mask)
        chunks = list(self._chunks(max(len(targets), plan.most_tokens)))

        def score(states: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
            sides = [None if side is None else side.rows(rows) for side in (flat_teacher, flat_reference)]
            return _score_chunk(head(states)[:, : self.vocab_limit], targets[rows], plan, sides[0], sides[1])

        # One chunk's logits are within the budget anyway; only several are worth recomputing.
        recompute = len(chunks) > 1 and torch.is_grad_enabled()
        parts = [
            checkpoint(score, hidden[rows], rows, use_reentrant=False) if recompute else score(hidden[rows], rows)
            for rows in chunks
        ]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        grids = [None if column is None else scatter_tokens(column, mask) for column in columns]
        logprobs, distil, divergence, reference_divergence, spread, teacher_logprobs = grids
        assert logprobs is not None and distil is not None
        return StudentScores(
            loss_mask=mask,
            logprobs=logprobs,
            distil_logprobs=distil,
            divergence=divergence,
            reference_divergence=reference_divergence,
            entropy=spread,
            teacher_logprobs=teacher_logprobs,
        )

    def _chunks(self, positions: int) -> Iterator[slice]:
        size = chunk_rows(self.vocab_limit, self.head_chunk)
        # Every rank calls the head, and equally often: a strategy may gather its weights with each call.
        for start in range(0, max(positions, 1), size):
            yield slice(start, start + size)


def _score_chunk(
    logits: Tensor, targets: Tensor, plan: ScorePlan, teacher: _FlatScores | None, reference: _FlatScores | None
) -> tuple[Tensor | None, ...]:
    """Log-probs, distil log-probs, both divergences, entropy and teacher log-probs [m] of one chunk [m, V]."""
    logprobs = token_logprobs(logits, targets, plan.sampling_temperature)
    same = plan.distil_temperature == plan.sampling_temperature
    distil = logprobs if same else token_logprobs(logits, targets, plan.distil_temperature)
    divergence, teacher_logprobs = _divergence(plan, plan.divergence, logits, distil, targets, teacher)
    to_reference, _ = _divergence(plan, plan.reference_divergence, logits, distil, targets, reference)
    spread = entropy(logits.detach(), plan.sampling_temperature) if plan.entropy else None
    return logprobs, distil, divergence, to_reference, spread, teacher_logprobs


def _divergence(
    plan: ScorePlan,
    estimator: DivergenceEstimator | None,
    logits: Tensor,
    distil_logprobs: Tensor,
    targets: Tensor,
    other: _FlatScores | None,
) -> tuple[Tensor | None, Tensor | None]:
    if other is None:
        return None, None
    temperature, needs = plan.distil_temperature, None if estimator is None else estimator.needs
    wanted = needs is not None and needs.needs_distribution
    other_logits = other.logits(logits.shape[1], temperature) if wanted else None
    # What a teacher left at positions it could not score may be anything, NaN included; it must not reach a gradient.
    sampled = None if other.sampled is None else torch.where(other.valid, other.sampled, distil_logprobs.detach())
    if sampled is None and other_logits is not None:
        sampled = token_logprobs(other_logits, targets)
    if estimator is None or needs is None:
        return None, sampled
    scaled = logits / temperature if (needs.full or needs.topk or needs.student_topk) else None
    student_topk = other_topk = None
    if needs.student_topk:
        assert scaled is not None and other_logits is not None
        ids = scaled.detach().topk(needs.student_topk, dim=-1).indices
        student_topk, other_topk = (_gather(side, ids) for side in (scaled, other_logits))
    elif needs.topk:
        assert scaled is not None and other.topk_ids is not None and other.topk is not None
        student_topk = _gather(scaled, other.topk_ids[:, : needs.topk])
        other_topk = torch.where(other.valid[:, None], other.topk[:, : needs.topk], student_topk.detach())
    student_view = TokenScores(sampled=distil_logprobs, topk=student_topk, logits=scaled if needs.full else None)
    other_view = TokenScores(sampled=sampled, topk=other_topk, logits=other_logits if needs.full else None)
    value = estimator(student_view, other_view)
    return torch.where(other.valid, value, torch.zeros_like(value)), sampled


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probs [m, K] at `ids` [m, K], without a second [m, V] tensor for the result."""
    return logits.gather(-1, ids) - logits.logsumexp(dim=-1, keepdim=True)


def vocab_mismatch(student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Return what differs between two tokenizers: `ids`, `eos`, `chat_template` with a description each, or nothing.

    Padding of the embedding matrices does not count: only tokens that the tokenizers name are compared.
    """
    ours, theirs = student.get_vocab(), other.get_vocab()
    found = []
    moved = [(t, i, theirs.get(t)) for t, i in sorted(ours.items(), key=lambda item: item[1]) if theirs.get(t) != i]
    if moved:
        token, i, j = moved[0]
        found.append(f"ids: {len(moved)} tokens differ, the first is {token!r}: student {i}, teacher {j}")
    if student.eos_token_id != other.eos_token_id:
        our_end, their_end = (f"{t.eos_token!r} ({t.eos_token_id})" for t in (student, other))
        found.append(f"eos: student {our_end}, teacher {their_end}")
    if student.chat_template != other.chat_template:
        found.append("chat_template: the student's prompts would look unfamiliar to the teacher")
    return found


def end_token_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> tuple[int, ...]:
    """Return the ids that end a completion: the tokenizer's end token and the generation config's, in order."""
    declared = getattr(config, "eos_token_id", None)
    more: Sequence[int] = [declared] if isinstance(declared, int) else declared or []
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *more]))
