"""What is measured on a finished student, the same for every method: 500 held-out problems, no part of any training."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from distillkit import HFSampler, LocalTeacher
from distillkit.components import StudentInfo
from distillkit.divergences.full import ReverseKL
from distillkit.embedded.arithmetic import Row, check_chain, held_out
from distillkit.embedded.decompositions import alignment, path
from distillkit.models import load_causal_lm, load_tokenizer
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, SampleRequest, SamplingSettings, ScoreRequest

__all__ = ["measure"]

_SAMPLES, _MAX_NEW_TOKENS, _PROBLEMS_AT_ONCE, _SEED = 8, 24, 125, 12345


def measure(student: Path) -> dict[str, object]:
    """Return the figures of a student folder.

    | key | meaning |
    |---|---|
    | `correct` | per held-out problem, "1" or "0": the greedy answer is right |
    | `accuracy`, `length` | mean of `correct`; mean tokens of greedy completions, end token included |
    | `legal` | share of greedy chains whose every step is legal |
    | `aligned` | per problem, structural reward of the greedy chain ÷ steps of the reference chain it is held against |
    | `sampled_accuracy` | mean over 8 samples per problem at temperature 1 |
    | `teacher_reverse_kl` | KL(π_θ‖π_T) in nats/token, exact at every token of those samples, token mean |
    | `paths` | distinct legal orders of steps among a problem's 8 samples, mean over problems |
    """
    scorer, info = _load(student)
    rows = held_out()
    greedy = _answers(scorer, info, rows, samples=1, temperature=0.0)
    checks = [check_chain(row["prompt"], batch_text) for row, batch_text in zip(rows, _texts(greedy), strict=True)]
    aligned = [alignment(row["prompt"], text, row["chain"]) for row, text in zip(rows, _texts(greedy), strict=True)]
    drawn = _answers(scorer, info, rows, samples=_SAMPLES, temperature=1.0)
    texts = _texts(drawn)
    groups = [texts[i : i + _SAMPLES] for i in range(0, len(texts), _SAMPLES)]
    orders = [{path(row["prompt"], text) for text in group} - {None} for row, group in zip(rows, groups, strict=True)]
    right = [check_chain(r["prompt"], text).correct for r, group in zip(rows, groups, strict=True) for text in group]
    return {
        "correct": "".join(str(int(check.correct)) for check in checks),
        "accuracy": statistics.mean(check.correct for check in checks),
        "legal": statistics.mean(check.legal for check in checks),
        "length": statistics.mean(length for batch in greedy for length in batch.completion_lengths.tolist()),
        "aligned": [round(value, 4) for value in aligned],
        "sampled_accuracy": statistics.mean(right),
        "teacher_reverse_kl": _teacher_reverse_kl(scorer, info, drawn),
        "paths": statistics.mean(len(order) for order in orders),
    }


def _load(student: Path) -> tuple[StudentScorer, StudentInfo]:
    model = load_causal_lm(str(student), where="student", dtype="float32").eval()
    tokenizer = load_tokenizer(str(student), where="student")
    info = StudentInfo(
        tokenizer=tokenizer,
        vocab_limit=len(tokenizer),
        eos_token_ids=(int(tokenizer.eos_token_id),),
        pad_token_id=int(tokenizer.pad_token_id),
        device=torch.device("cpu"),
    )
    return StudentScorer(model, vocab_limit=info.vocab_limit), info


def _answers(
    scorer: StudentScorer, info: StudentInfo, rows: list[Row], *, samples: int, temperature: float
) -> list[RolloutBatch]:
    """Return `samples` completions of every row, in order, in batches of whole groups."""
    sampler = HFSampler(rows_per_batch=512)
    sampler.setup(info)
    sampler.sync(scorer)
    settings = SamplingSettings(group_size=samples, max_new_tokens=_MAX_NEW_TOKENS, temperature=temperature)
    requests = [
        SampleRequest(
            prompt_ids=tuple(info.tokenizer(row["prompt"])["input_ids"]),
            prompt=row["prompt"],
            row=dict(row),
            group_id=i,
            seed=_SEED + i,
            settings=settings,
        )
        for i, row in enumerate(rows)
    ]
    groups = sorted(sampler.sample(requests), key=lambda group: group.request.group_id)
    parts = [groups[i : i + _PROBLEMS_AT_ONCE] for i in range(0, len(groups), _PROBLEMS_AT_ONCE)]
    return [RolloutBatch.from_groups(part, info.pad_token_id) for part in parts]


def _texts(batches: list[RolloutBatch]) -> list[str]:
    return [text for batch in batches for text in batch.texts]


@torch.no_grad()
def _teacher_reverse_kl(scorer: StudentScorer, info: StudentInfo, batches: list[RolloutBatch]) -> float:
    teacher = LocalTeacher(path="embedded:teacher")
    teacher.setup(info)
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=ReverseKL())
    total, tokens = 0.0, 0
    for batch in batches:
        scores = scorer(batch, plan, teacher.score(batch, ScoreRequest(full=True)))
        total += float(scores.divergence.sum())
        tokens += int(batch.loss_mask.sum())
    return total / tokens
