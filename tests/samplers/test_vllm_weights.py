"""The student's tensors on their way to an engine: which, in what form, and over a socket."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import torch

from distillkit.errors import ModelError
from distillkit.samplers.vllm_sender import WeightSender
from distillkit.samplers.vllm_weights import Piece, StudentWeights, assemble
from distillkit.samplers.vllm_worker import Delivery, differences, received
from distillkit.scorer import StudentScorer
from distillkit.testing import tiny_model

peft = pytest.importorskip("peft", reason="adapters need the extra distillkit[lora]")

CPU = torch.device("cpu")


def lora(**arguments: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **arguments}
    model: Any = peft.get_peft_model(tiny_model(5), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def scorer(model: Any) -> StudentScorer:
    return StudentScorer(model, vocab_limit=10)


def test_a_plain_student_is_its_parameters_within_the_vocabulary() -> None:
    model = tiny_model(5)
    got = dict(assemble(StudentWeights(scorer(model)).everything(), {}, CPU))
    assert got.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        limited = "embed_tokens" in name or "lm_head" in name
        assert torch.equal(got[name], parameter[:10] if limited else parameter)
    assert not StudentWeights(scorer(model)).adapted


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 1}},
    ],
    ids=str,
)
def test_assembled_weights_are_those_of_the_merged_student(arguments: dict[str, Any]) -> None:
    model = lora(**arguments)
    weights = StudentWeights(scorer(model))
    assert weights.adapted
    kept: dict[str, torch.Tensor] = {}
    first = dict(assemble(weights.everything(), kept, CPU))
    merged: Any = copy.deepcopy(model).merge_and_unload()
    wanted = dict(StudentWeights(scorer(merged))._weights)
    assert first.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(first[name], tensor, atol=1e-7, rtol=1e-6)
    again = dict(assemble(weights.adapter(), kept, CPU))
    assert again.keys() == kept.keys() and all(torch.equal(again[name], first[name]) for name in again)
    assert dict(assemble(weights.blocks(), {}, CPU)).keys() == kept.keys()


def test_weights_that_an_engine_fuses_with_an_adapted_one_come_with_it() -> None:
    names = {piece.name for piece in StudentWeights(scorer(lora())).blocks()}
    assert {f"model.layers.0.self_attn.{side}_proj.weight" for side in "qkvo"} <= names
    assert {f"model.layers.0.mlp.{side}_proj.weight" for side in ("gate", "up", "down")} <= names
    assert not [name for name in names if "norm.weight" in name and "self_attn" not in name]
    assert not [name for name in names if "embed" in name or "lm_head" in name]


def _twice() -> Any:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def _merged() -> Any:
    model = lora()
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: lora(use_dora=True), "Dora"),
        (lambda: lora(target_modules=["embed_tokens"]), "model.embed_tokens: adapters []"),
        (lambda: lora(modules_to_save=["lm_head"]), "lm_head.modules_to_save.default.weight"),
        (lambda: lora(lora_bias=True), "with a bias in its adapter"),
        (lambda: lora(target_modules=["lm_head"]), "lm_head.weight, which shares its weight with another layer"),
        (_twice, "adapters ['default', 'other']"),
        (_merged, "merged: True"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(build: Any, text: str) -> None:
    with pytest.raises(ModelError) as caught:
        StudentWeights(scorer(build()))
    assert "model.sampler: an engine cannot take this adapter" in str(caught.value)
    assert text in str(caught.value)


TENSORS = [
    torch.arange(12.0).reshape(3, 4),
    torch.randn(5, 3).to(torch.bfloat16),
    torch.arange(6).reshape(2, 3).T,
    torch.tensor(3.5),
    torch.zeros(0, 4),
]


def test_tensors_arrive_as_they_left() -> None:
    pieces = [Piece(name=str(i), part="whole", tensor=t, scale=i / 3) for i, t in enumerate(TENSORS)]
    with WeightSender(pieces, host="127.0.0.1", readers=2, timeout_s=20) as sender:
        delivery = Delivery(**sender.delivery(complete=True))
        for _ in range(2):
            got = list(received(delivery))
            assert [(p.name, p.part, p.scale) for p in got] == [(p.name, p.part, p.scale) for p in pieces]
            for ours, theirs in zip(TENSORS, got, strict=True):
                assert ours.dtype == theirs.tensor.dtype and torch.equal(ours, theirs.tensor)


def test_without_the_key_there_is_nothing() -> None:
    pieces = [Piece(name="w", part="whole", tensor=torch.ones(4))]
    with WeightSender(pieces, host="127.0.0.1", readers=1, timeout_s=20) as sender:
        delivery = Delivery(**{**sender.delivery(complete=True), "key": "00" * 16})
        with pytest.raises(ConnectionError, match="in the middle of its weights"):
            list(received(delivery))


def test_a_sender_that_nobody_asks_ends() -> None:
    with WeightSender([], host="127.0.0.1", readers=1, timeout_s=600) as sender:
        port = sender.delivery(complete=True)["port"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_differences_of_two_configs() -> None:
    theirs = {"vocab_size": 99, "hidden_size": 8, "rope": {"theta": 1.0}, "only_here": 1}
    assert differences({"vocab_size": 98, "hidden_size": 8, "rope": {"theta": 1.0}}, theirs) == [
        "vocab_size: 99 (student) and 98 (server)"
    ]
