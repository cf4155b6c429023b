"""One gradient for tied weights: the sum that autograd forms of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.backbone import LMHead
from distillkit.lora import LoraSettings, apply_lora
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.tied import TiedGradient
from tests import toy

PLAN = ScorePlan(sampling_temperature=0.8, distil_temperature=1.0, entropy=True)
WITH_PADDING = [[2, 0, 3, 4], [5, 6], [7, 0, 9, 10, 11]]
"""Prompts in which the padding token, whose embedding takes no gradient, is a token like others."""


def gradients(model: PreTrainedModel, *, packed: bool, head_chunk: int, micro_batches: int = 2) -> dict[str, Tensor]:
    """Of the mean log-prob, over several backward passes."""
    scorer = StudentScorer(model.train(), vocab_limit=len(toy.VOCABULARY), head_chunk=head_chunk)
    for i in range(micro_batches):
        batch = toy.batch(WITH_PADDING if i == 0 else [[2, 3, 4], [5, 5]])
        plan = ScorePlan(**{**vars(PLAN), "packed": packed})
        (scorer(batch, plan).logprobs.square().mean() * (i + 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head_chunk", [3, 10**6])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_autograd(packed: bool, head_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toy.model(0).get_input_embeddings().padding_idx == 0
    got = gradients(toy.model(0).double(), packed=packed, head_chunk=head_chunk)
    monkeypatch.setattr(LMHead, "tied", lambda self: None)
    want = gradients(toy.model(0).double(), packed=packed, head_chunk=head_chunk)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_heads_gradient_is_the_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    take = TiedGradient.take

    def spy(self: TiedGradient, of_head: Tensor | None) -> Tensor | None:
        assert of_head is not None
        seen.append(of_head.data_ptr())
        return take(self, of_head)

    monkeypatch.setattr(TiedGradient, "take", spy)
    model = toy.model(0)
    gradients(model, packed=False, head_chunk=3, micro_batches=1)
    weight: Any = model.get_input_embeddings().weight
    assert seen == [weight.grad.data_ptr()]


def test_only_one_plain_matrix_is_shared() -> None:
    assert LMHead(toy.model(0)).tied() is not None
    assert LMHead(toy.model(0, tied=False)).tied() is None
    frozen = apply_lora(toy.model(0), LoraSettings(rank=2, target_modules=["q_proj"]))
    assert LMHead(frozen).tied() is None, "its weights take no gradient"
    hooked = toy.model(0)
    hooked.get_output_embeddings().register_forward_hook(lambda module, args, out: out * 1.5)
    assert LMHead(hooked).tied() is None, "the head has to be called"
    renormed = toy.model(0)
    embedding: Any = renormed.get_input_embeddings()
    embedding.max_norm = 1.0
    assert LMHead(renormed).tied() is None


def test_a_head_alone_and_an_embedding_alone_have_their_gradients() -> None:
    embedding = nn.Embedding(5, 3)
    ids = torch.tensor([[1, 1, 4]])
    tied = TiedGradient(embedding.weight, embedding)
    assert tied.take(of_head := torch.ones(5, 3)) is of_head, "nothing was embedded"
    with tied.forward():
        out = embedding(ids)
        with torch.no_grad():
            assert not embedding(ids).requires_grad
    out.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.sum(dim=1).tolist() == [0, 6, 0, 0, 3]
    assert not embedding._forward_hooks
