"""Every built-in part passes the suite of its slot, the same that plugin authors get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distillkit import registry
from distillkit.components import Component
from distillkit.rewards.gsrm.local import LocalDecomposer
from distillkit.testing import (
    char_tokenizer,
    check,
    check_class,
    check_reward,
    check_sampler,
    encode,
    rollout_batch,
    sample_requests,
    tiny_model,
)
from tests.rewards.gsrm import markov
from tests.teachers.fake_vllm import FakeVLLM, running

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "divergence k2": [{}, {"bound": 5.0}],
    "divergence jsd": [{"teacher_weight": w} for w in (0.1, 0.5, 0.9)],
    "divergence skew_forward_kl": [{"weight": w} for w in (0.0, 0.1, 0.9)],
    "divergence skew_reverse_kl": [{"weight": w} for w in (0.0, 0.1, 0.9)],
    "divergence power": [{"exponent": e} for e in (-2.0, -1.0, -0.5, 0.0, 2 / 3, 3.0)],
    "divergence topk": [
        {"k": k, "direction": d, "tail": t, "chosen_by": c}
        for k in (1, 64)
        for d in ("reverse", "forward")
        for t in (True, False)
        for c in ("teacher", "student")
    ],
    "beta constant": [{"value": 0.02}],
    "beta linear": [{"start": 5e-3, "end": 1e-3, "steps": 80}, {"start": 5e-3, "end": 1e-3, "delta": 5e-5}],
    "beta cosine": [{"start": 1.0, "end": 0.0, "steps": 10}],
    "beta switch": [{"before": 1.0, "after": 0.0, "at": 60}],
    "beta adaptive_kl": [
        {"start": 0.1, "target": 0.5},
        {"start": 0.1, "target": 0.5, "min": 0.099, "max": 0.101, "gain": 0.5, "signal": "train/reverse_kl_to_old"},
    ],
    "beta reward_progress": [
        {"start": 1.0, "end": 0.1, "high": 0.9},
        {"start": 1.0, "end": 0.1, "high": 0.6, "low": 0.1, "decay": 0.5, "signal": "train/divergence"},
        {"start": 1.0, "end": 0.1, "high": 1.0, "monotone": False, "decay": 0.5, "signal": "train/divergence"},
    ],
    "masker response_level": [{"unknown": "drop"}, {"unknown": "keep"}],
    "masker group_level": [{"unknown": "drop"}, {"unknown": "keep"}],
    "masker routed": [{"unknown": "drop"}, {"unknown": "keep"}],
    "objective grpo": [
        {},
        {"std": False, "aggregation": "constant", "constant_length": 100},
        {"dual_clip": 3.0, "clip_high": 0.28, "correction": 0, "aggregation": "sequence"},
    ],
    "objective gspo": [{}, {"clip_low": 0.2, "clip_high": 0.2}, {"aggregation": "token", "std": False}],
    "objective cispo": [{}, {"clip_low": 0.2, "clip_high": 0.1, "aggregation": "sequence"}],
    "objective rlsd": [{}, {"mix": 0.0}, {"mix": 1.0, "bound": 0.9}, {"dual_clip": 3.0}],
    "objective trrd": [
        {},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"clamp": None},
        {"clamp_grad": "through"},
        {"clamp_grad": "detached", "dual_clip": 3.0},
    ],
}

PURE = [entry for kind in ("divergence", "beta", "masker", "objective") for entry in registry.entries(kind)]


def build(entry: registry.Entry, arguments: dict[str, Any]) -> Component:
    part: Component = registry.import_object(entry.class_path)(**arguments)
    return part


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        pytest.param(entry, arguments, id=f"{entry.kind} {entry.name} {arguments}")
        for entry in PURE
        if entry.built_in
        for arguments in ARGUMENTS.get(f"{entry.kind} {entry.name}", [{}])
    ],
)
def test_built_in_parts_without_models(entry: registry.Entry, arguments: dict[str, Any]) -> None:
    check(build(entry, arguments))


@pytest.mark.parametrize("entry", [e for e in registry.entries() if e.built_in], ids=lambda e: f"{e.kind} {e.name}")
def test_built_in_classes(entry: registry.Entry) -> None:
    assert check_class(entry.kind, registry.import_object(entry.class_path)).startswith("constructor")


def test_built_in_rewards_with_rows_of_their_own() -> None:
    people = {"names": ["Ann", "Bob"], "solution": [True, False]}
    told = "<answer>(1) Ann is a knight (2) Bob is a knave</answer>"
    groups = {"who?": [told, told.replace("knave", "knight"), "nobody knows", ""]}
    entry = registry.find("reward", "knights_and_knaves")
    part = build(entry, {})
    check_reward(part, rollouts=rollout_batch(groups, rows=[people], max_new_tokens=80))  # type: ignore[arg-type]


def test_structure_reward_with_a_local_decomposer(tmp_path: Path) -> None:
    step = "Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: {0}\nFinal answer: {0}"
    replies = {"a": step.format(1), "b": step.format(2), "?": "It has no steps."}
    decomposer = LocalDecomposer(path=markov.decomposer(tmp_path, replies), max_new_tokens=4)
    groups = {"p1": ["xa", "ya", "xb", "?"], "p2": ["b", "a", "?", ""]}
    rows = [{"teacher_trace": "ta"}, {"teacher_trace": "tb"}]
    part = build(registry.find("reward", "gsrm"), {"decomposer": decomposer, "coverage_weight": 0.5})
    check_reward(part, rollouts=rollout_batch(groups, rows=rows))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(5).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


def test_local_teacher(checkpoint: str) -> None:
    check(build(registry.find("teacher", "local"), {"path": checkpoint}))


def test_local_teacher_in_small_batches(checkpoint: str) -> None:
    arguments = {"path": checkpoint, "tokens_per_batch": 20, "head_chunk": 2}
    check(build(registry.find("teacher", "local"), arguments))


def test_vllm_teacher(checkpoint: str) -> None:
    with running(FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))) as servers:
        urls = tuple(server.url for server in servers)
        check(build(registry.find("teacher", "vllm"), {"urls": urls, "path": checkpoint, "concurrency": 2}))


def test_cached_teacher(checkpoint: str, tmp_path: Path) -> None:
    local = build(registry.find("teacher", "local"), {"path": checkpoint})
    check(build(registry.find("teacher", "cached"), {"teacher": local, "dir": str(tmp_path)}))


@pytest.mark.parametrize("arguments", [{}, {"rows_per_batch": 3}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_hf_sampler(arguments: dict[str, Any], temperature: float) -> None:
    part = build(registry.find("sampler", "hf"), arguments)
    check(part, requests=sample_requests(temperature=temperature))


def test_replay_sampler(tmp_path: Path) -> None:
    requests = sample_requests()
    lines = [
        {"prompt": r.prompt, "completion_ids": [[*encode(text), 1] for text in ("2", "33", "#", "4")]} for r in requests
    ]
    file = tmp_path / "recorded.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    part = build(registry.find("sampler", "replay"), {"path": str(file), "group_size": 4})
    check_sampler(part, requests=requests, draws=False)  # type: ignore[arg-type]
