"""The base weights of a LoRA student as teacher: equal to a copy of them, and without effect on the student."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.components import StudentBase, StudentInfo
from distillkit.errors import ConfigError, ScoringError
from distillkit.lora import LoraSettings, apply_lora
from distillkit.models import enable_gradient_checkpointing
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.teachers.adapter_off import AdapterOffTeacher
from distillkit.teachers.local import LocalTeacher
from distillkit.testing import check, student_info, tiny_model
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores
from tests import toy

EVERYTHING = ScoreRequest(sampled=True, topk=4, full=True, entropy=True, temperature=0.7)
TARGETS = ["q_proj", "down_proj", "lm_head"]


def lora(model: Any, targets: list[str] = TARGETS) -> Any:
    """Adapters that matter, on layers and on the head."""
    adapted = apply_lora(model, LoraSettings(rank=4, target_modules=targets)).train()
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    return adapted


def of(model: Any, info: StudentInfo | None = None) -> StudentInfo:
    student = StudentScorer(model, vocab_limit=len(toy.VOCABULARY))
    return replace(
        info or toy.info(), base=StudentBase(identity="sha256:toy:float32", whole=lambda: nullcontext(student))
    )


@pytest.fixture
def batch() -> RolloutBatch:
    return toy.batch([[3, 4], [5, 6, 7]])


def teacher(model: Any, **arguments: Any) -> AdapterOffTeacher:
    part = AdapterOffTeacher(**arguments)
    part.setup(of(model))
    return part


def logits(scores: TeacherScores) -> torch.Tensor:
    assert scores.hidden is not None and scores.head is not None
    return scores.head(torch.cat(list(scores.hidden)))


@pytest.mark.parametrize("arguments", [{}, {"tokens_per_batch": 20, "head_chunk": 2}], ids=str)
def test_scores_are_those_of_a_copy_of_the_base(arguments: dict[str, Any], batch: RolloutBatch, tmp_path: Path) -> None:
    toy.model(0, tied=False).save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    copy = LocalTeacher(path=str(tmp_path))
    copy.setup(toy.info())
    expected = copy.score(batch, EVERYTHING)
    model = lora(toy.model(0, tied=False))
    found = teacher(model, **arguments).score(batch, EVERYTHING)
    for name in ("sampled", "topk", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.topk_ids, expected.topk_ids)  # type: ignore[arg-type]
    # The adapters are on again when a divergence projects the states.
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=1e-5)


def test_the_student_is_left_as_it_was(batch: RolloutBatch) -> None:
    model = lora(toy.model(0, tied=False))
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0)
    scorer = StudentScorer(model, vocab_limit=len(toy.VOCABULARY))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        scored: torch.Tensor = scorer(batch, plan).logprobs
        scored.sum().backward()
        return scored.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before, gradients = step()
    base = teacher(model).score(batch, ScoreRequest(sampled=True)).sampled
    assert base is not None and (base - before)[batch.loss_mask].abs().max() > 0.1
    after, again = step()
    assert torch.equal(before, after) and gradients.keys() == again.keys() == learning
    assert all(torch.equal(gradients[name], value) for name, value in again.items())
    assert model.training


def test_a_failure_while_scoring_switches_the_adapters_on_again(batch: RolloutBatch) -> None:
    model = lora(toy.model(0, tied=False))
    part = teacher(model, head_chunk=0)
    with pytest.raises(ValueError, match="zero"):
        part.score(batch, EVERYTHING)
    assert model.get_model_status().enabled is True
    assert any(p.requires_grad for p in model.parameters())


def test_it_scores_under_gradient_checkpointing(batch: RolloutBatch) -> None:
    plain, checkpointed = (lora(toy.model(0, tied=False)) for _ in range(2))
    enable_gradient_checkpointing(checkpointed)
    ours, theirs = (teacher(m).score(batch, EVERYTHING).sampled for m in (checkpointed, plain))
    torch.testing.assert_close(ours, theirs)


def test_conformance() -> None:
    model = lora(tiny_model(5), ["q_proj", "down_proj"])
    check(AdapterOffTeacher(tokens_per_batch=40), student=of(model, student_info()))


def test_a_student_without_adapters_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterOffTeacher().setup(toy.info())
    assert str(caught.value) == (
        "model: adapter_off scores with the student's base weights, and this student is trained whole\n"
        "    got:      model.lora: null\n"
        "    expected: a student with LoRA\n"
        "    try:      model.lora: {rank: 16}, or {name: local, path: <model.student>} for a second copy"
    )


def test_it_has_no_identity_before_it_knows_the_student() -> None:
    with pytest.raises(ScoringError, match="used before setup"):
        AdapterOffTeacher().identity()
    assert teacher(lora(toy.model(0, tied=False))).identity() == "adapter_off:sha256:toy:float32"
