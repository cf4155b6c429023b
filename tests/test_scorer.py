"""The chunked scoring pass against full logits, and the shapes it never makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from distillkit.backbone import LMHead
from distillkit.components import DivergenceEstimator
from distillkit.divergences.full import JSD, ForwardKL, ReverseKL
from distillkit.divergences.sampled import K2, K3
from distillkit.divergences.topk import TopK
from distillkit.errors import ModelError
from distillkit.functional import divergences as reference
from distillkit.models import _check_head
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.teachers.local import LocalTeacher
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores
from tests import toy

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]


def local_teacher(model: nn.Module, limit: int = len(toy.VOCABULARY)) -> LocalTeacher:
    teacher = LocalTeacher(path="unused")
    teacher._model = model.eval().requires_grad_(False)  # type: ignore[assignment]
    teacher._student = toy.info(limit)
    return teacher


def full_logits(model: nn.Module, batch: RolloutBatch) -> Tensor:
    """Logits [M, V] that predict the loss-mask tokens, through the model's own forward."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits
    return logits[:, :-1][batch.loss_mask[:, 1:]]


def expected_divergence(part: DivergenceEstimator, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Each divergence from whole distributions, in one piece."""
    logp, logq = student.log_softmax(-1), teacher.log_softmax(-1)
    chosen = [side.gather(-1, targets[:, None]).squeeze(-1) for side in (logp, logq)]
    if isinstance(part, TopK):
        ids = (logq if part.chosen_by == "teacher" else logp).topk(part.k, dim=-1).indices
        return reference.topk_reverse_kl(logp.gather(-1, ids), logq.gather(-1, ids))
    if isinstance(part, K2):
        return (chosen[0] - chosen[1]) ** 2 / 2
    if isinstance(part, K3):
        return (chosen[1] - chosen[0]).exp() - (chosen[1] - chosen[0]) - 1
    if isinstance(part, ForwardKL):
        return (logq.exp() * (logq - logp)).sum(-1)
    if isinstance(part, ReverseKL):
        return (logp.exp() * (logp - logq)).sum(-1)
    mixture = (logp.exp() / 2 + logq.exp() / 2).log()
    return ((logp.exp() * (logp - mixture)).sum(-1) + (logq.exp() * (logq - mixture)).sum(-1)) / 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "part",
    [K2(), K3(), ForwardKL(), ReverseKL(), JSD(), TopK(k=5), TopK(k=5, chosen_by="student")],
    ids=lambda part: f"{type(part).__name__}-{getattr(part, 'chosen_by', '')}",
)
def test_chunked_pass_equals_full_logits_in_values_and_gradients(part: DivergenceEstimator, tied: bool) -> None:
    batch = toy.batch(PROMPTS)
    student, teacher = toy.model(0, tied=tied).double(), toy.model(1).double()
    temperature = 1.7
    request = ScoreRequest(sampled=True) | part.needs
    scores = local_teacher(teacher).score(batch, type(request)(**{**vars(request), "temperature": temperature}))
    plan = ScorePlan(sampling_temperature=0.8, distil_temperature=temperature, divergence=part, entropy=True)
    ours = StudentScorer(student, vocab_limit=len(toy.VOCABULARY), head_chunk=3)(batch, plan, scores)
    weights = torch.rand(batch.loss_mask.sum(), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = batch.loss_mask
    (ours.divergence[mask] @ weights + ours.logprobs[mask] @ weights.flip(0)).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    targets = batch.tokens[mask]
    logits = full_logits(student, batch)
    divergence = expected_divergence(part, logits / temperature, full_logits(teacher, batch) / temperature, targets)
    logp = (logits / 0.8).log_softmax(-1)
    logprobs = logp.gather(-1, targets[:, None]).squeeze(-1)
    (divergence @ weights + logprobs @ weights.flip(0)).backward()

    torch.testing.assert_close(ours.logprobs[mask], logprobs, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.entropy[mask], -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.divergence[mask], divergence, rtol=0, atol=1e-10)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("part", [K2(), ReverseKL(), TopK(k=4)], ids=lambda part: type(part).__name__)
def test_no_tensor_of_all_positions_times_vocabulary_exists_forward_or_backward(part: DivergenceEstimator) -> None:
    vocabulary, chunk = 4096, 4
    batch = toy.batch(PROMPTS, group_size=8, max_new_tokens=12)
    student, teacher = toy.model(0, vocabulary=vocabulary), toy.model(1, vocabulary=vocabulary)
    frozen = local_teacher(teacher, vocabulary)
    frozen.head_chunk = chunk
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=part)
    with LargestTensor() as seen:
        scores = frozen.score(batch, ScoreRequest(sampled=True) | part.needs)
        output = StudentScorer(student, vocab_limit=vocabulary, head_chunk=chunk)(batch, plan, scores)
        (output.divergence.sum() + output.logprobs.sum()).backward()
    weight = vocabulary * 16
    assert seen.elements <= max(weight, chunk * vocabulary)
    assert seen.elements < int(batch.loss_mask.sum()) * vocabulary / 4


def test_padded_vocabularies_are_cut_before_the_softmax() -> None:
    batch = toy.batch(PROMPTS)
    limit = len(toy.VOCABULARY)
    student, teacher = toy.model(0, vocabulary=limit + 3).double(), toy.model(1, vocabulary=limit + 7).double()
    scores = local_teacher(teacher, limit).score(batch, ScoreRequest(sampled=True, full=True))
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=ReverseKL())
    output = StudentScorer(student, vocab_limit=limit)(batch, plan, scores)
    mask = batch.loss_mask
    cut_student, cut_teacher = (full_logits(m, batch)[:, :limit] for m in (student, teacher))
    expected = reference.reverse_kl(cut_student, cut_teacher)
    torch.testing.assert_close(output.divergence[mask], expected, rtol=0, atol=1e-6)
    targets = batch.tokens[mask][:, None]
    torch.testing.assert_close(
        scores.sampled[mask], cut_teacher.log_softmax(-1).gather(-1, targets)[:, 0], rtol=0, atol=1e-6
    )


def _tiny(config_class: type, model_class: type, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        **more,
    )  # fmt: skip
    return model_class(config).eval()


@pytest.mark.parametrize(
    "model",
    [
        _tiny(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=3.0),
        _tiny(CohereConfig, CohereForCausalLM, logit_scale=0.3),
        _tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=4.0),
    ],
    ids=["soft-capping", "logit-scale", "logits-scaling"],
)
def test_head_with_scale_or_soft_capping_equals_the_models_own_logits(model: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(LMHead(model)(hidden), model(input_ids=ids).logits.float(), rtol=0, atol=1e-6)
    _check_head(model, "model.student")


def test_a_head_that_cannot_be_reproduced_is_refused() -> None:
    model = toy.model(0, tied=False)
    original = model.forward
    model.forward = lambda *a, **k: _doubled(original(*a, **k))  # type: ignore[method-assign]
    with pytest.raises(ModelError) as caught:
        _check_head(model, "model.student")
    assert "model.student: unsupported output head" in str(caught.value)
    assert "Qwen3ForCausalLM: logits differ by up to" in str(caught.value)


def _doubled(output: object) -> object:
    output.logits = output.logits * 2  # type: ignore[attr-defined]
    return output


def test_teacher_hidden_states_are_kept_per_rollout_and_survive_selection() -> None:
    batch = toy.batch(PROMPTS)
    scores: TeacherScores = local_teacher(toy.model(1)).score(batch, ScoreRequest(full=True))
    index = torch.tensor([5, 2])
    chosen = scores.select(index, int(batch.lengths[index].max()))
    assert [len(h) for h in chosen.hidden] == batch.loss_mask.sum(1)[index].tolist()
    assert torch.equal(chosen.hidden[0], scores.hidden[5])


@pytest.mark.parametrize("part", [K2(), K3(), TopK(k=3)], ids=lambda part: type(part).__name__)
def test_what_a_teacher_leaves_at_unscored_positions_reaches_no_gradient(part: DivergenceEstimator) -> None:
    batch = toy.batch(PROMPTS)
    scores = local_teacher(toy.model(1)).score(batch, ScoreRequest(sampled=True) | part.needs)
    valid = batch.loss_mask & (torch.arange(batch.tokens.shape[1]) % 2 == 0)
    broken = {
        name: value.masked_fill(~valid.reshape(*valid.shape, *[1] * (value.dim() - 2)), float("nan"))
        for name in ("sampled", "topk")
        if (value := getattr(scores, name)) is not None
    }
    plan = ScorePlan(sampling_temperature=1.0, distil_temperature=1.0, divergence=part)
    gradients = []
    for given in (replace(scores, valid=valid), replace(scores, valid=valid, **broken)):
        student = toy.model(0)
        output = StudentScorer(student, vocab_limit=len(toy.VOCABULARY))(batch, plan, given)
        assert torch.count_nonzero(output.divergence[batch.loss_mask & ~valid]) == 0
        output.divergence.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert torch.equal(*gradients)
