"""Some prompts for the student, the others answered by the dataset: which, with what tokens, and in a whole step."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from distillkit import embedded
from distillkit.betas.constant import Constant
from distillkit.cli.main import main
from distillkit.data.prompts import PreparedPrompt
from distillkit.data.sources import DataSource
from distillkit.data.streams import EvalBatch, EvalSet
from distillkit.divergences.full import JSD, ForwardKL
from distillkit.divergences.sampled import K2
from distillkit.errors import ConfigError, DataError, RolloutError
from distillkit.evaluation import evaluate_batch
from distillkit.samplers.hf import HFSampler
from distillkit.samplers.mixed import MixedSampler
from distillkit.testing import (
    FakeSampler,
    check_sampler,
    encode,
    sample_requests,
    student_info,
    tiny_student,
)
from distillkit.types import RolloutGroup, SampleRequest
from tests import toy
from tests.test_step import build, gradient


class Counting(FakeSampler):
    """Keeps the requests that reach it."""

    seen: tuple[int, ...] = ()

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.seen += tuple(request.group_id for request in requests)
        return super().sample(requests)


def one_by_one(count: int = 3, completion: Any = "4", **settings: Any) -> list[SampleRequest]:
    prompts = [f"{i}+{i}=" for i in range(count)]
    rows = [{"answer": "2", "completion": completion} for _ in prompts]
    return sample_requests(prompts, rows=rows, group_size=1, **settings)


def mixed(share: float, inner: FakeSampler | None = None, **arguments: Any) -> MixedSampler:
    part = MixedSampler(sampler=inner or FakeSampler(group_size=1), on_policy_share=share, **arguments)
    part.setup(student_info())
    part.sync(tiny_student())
    return part


def given(groups: Sequence[RolloutGroup]) -> set[int]:
    return {group.request.group_id for group in groups if int(group.rollouts[0].policy_version[0]) == -1}


def test_a_given_completion_is_tokenised_and_ended() -> None:
    (group,) = mixed(0.0).sample(one_by_one(1, "4+4"))
    (rollout,) = group.rollouts
    assert rollout.completion_ids.tolist() == [*encode("4+4"), 1]
    assert rollout.completion_ids.dtype == torch.int64
    assert rollout.loss_mask.tolist() == [True] * 4
    assert rollout.behaviour_logprobs.isnan().all()
    assert rollout.policy_version.tolist() == [-1] * 4
    assert (rollout.finish_reason, rollout.text) == ("stop", "4+4")


@pytest.mark.parametrize(
    ("text", "ids", "reason", "said"),
    [
        ("123456", encode("123456"), "length", "123456"),
        ("1234567", encode("123456"), "length", "123456"),
        ("12345", (*encode("12345"), 1), "stop", "12345"),
        ("12<eos>", (*encode("12"), 1), "stop", "12"),
    ],
)
def test_a_given_completion_is_cut_at_max_new_tokens(text: str, ids: tuple[int, ...], reason: str, said: str) -> None:
    ((rollout,),) = [group.rollouts for group in mixed(0.0).sample(one_by_one(1, text, max_new_tokens=6))]
    assert tuple(rollout.completion_ids.tolist()) == ids
    assert (rollout.finish_reason, rollout.text) == (reason, said)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_the_student_is_that_of_the_setting(share: float) -> None:
    inner = Counting(group_size=1)
    groups = list(mixed(share, inner).sample([replace(r, group_id=i) for i, r in enumerate(one_by_one(400))]))
    assert len(groups) == 400
    assert len(inner.seen) == 400 - len(given(groups))
    assert len(inner.seen) / 400 == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)


def test_whose_turn_it_is_depends_on_the_seed_alone() -> None:
    requests = one_by_one(40)
    whole = given(list(mixed(0.5).sample(requests)))
    assert 0 < len(whole) < 40
    part = mixed(0.5)
    halves = given([*part.sample(requests[::2]), *part.sample(requests[1::2])])
    alone = {i for request in reversed(requests) for i in given(list(part.sample([request])))}
    assert whole == halves == alone
    reseeded = given(list(part.sample([replace(r, seed=r.seed + 1) for r in requests])))
    assert reseeded != whole
    more = given(list(mixed(0.75).sample(requests)))
    assert more < whole, "a larger share gives the student more of the same prompts"


def test_everything_is_the_inner_samplers_at_share_1_groups_included() -> None:
    inner, requests = FakeSampler(group_size=4), sample_requests()
    part = mixed(1.0, inner)
    assert part.settings == inner.settings
    ours = {g.request.group_id: [r.completion_ids.tolist() for r in g.rollouts] for g in part.sample(requests)}
    theirs = {g.request.group_id: [r.completion_ids.tolist() for r in g.rollouts] for g in inner.sample(requests)}
    assert ours == theirs


def test_conformance_with_a_real_student() -> None:
    rows = [{"completion": text} for text in ("2", "33", "#")]
    requests = sample_requests(rows=rows, group_size=1)
    hf = HFSampler(group_size=1, max_new_tokens=6)
    check_sampler(MixedSampler(sampler=hf, on_policy_share=0.5), requests=requests, draws=False)
    assert 0 < len(given(list(mixed(0.5).sample(requests)))) < 3
    check_sampler(MixedSampler(sampler=hf, on_policy_share=0.0), requests=requests, draws=False)
    check_sampler(MixedSampler(sampler=hf, on_policy_share=1.0), requests=requests)


def test_evaluation_is_the_students_alone() -> None:
    prompts = [
        PreparedPrompt(prompt_ids=encode("1+1="), prompt="1+1=", row={"answer": "2", "completion": "999"}, index=i)
        for i in range(8)
    ]
    chosen = EvalSet(name="held_out", source=DataSource(path="unused"), k=2, temperature=1.0)
    inner = Counting(group_size=1)
    results = evaluate_batch(
        EvalBatch(eval_set=chosen, set_index=0, prompts=prompts, valid=[True] * 8),
        sampler=mixed(0.0, inner),
        rewards=[],
        student_info=student_info(),
        seed=1,
    )
    assert len(inner.seen) == 8
    assert all(completion.text != "999" for result in results for completion in result.completions)


# ---- in a step


class Answered(toy.RandomSampler):
    """A student that is not asked."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        raise AssertionError("the student was asked")


def test_a_step_on_given_completions_has_the_gradient_of_the_divergence_at_their_tokens() -> None:
    requests = [
        replace(request, row={"completion": text})
        for request, text in zip(toy.requests([[2, 3, 4], [5, 6]], group_size=1), ("12", "345"), strict=True)
    ]
    sampler = MixedSampler(sampler=Answered(group_size=1, max_new_tokens=8), on_policy_share=0.0)
    sampler.setup(toy.info())
    found, backend, output = gradient(build(divergence=ForwardKL(), sampler=sampler), requests)
    ids = [[2, 3, 4, 3, 4, 1], [5, 6, 5, 6, 7, 1]]
    assert [row[:6].tolist() for row in output.rollouts.tokens] == ids
    student, teacher = toy.model(0), toy.model(1)
    total, count = torch.zeros(()), 0
    for row, start in zip(ids, (3, 2), strict=True):
        logp, logq = (model(input_ids=torch.tensor([row])).logits[0, start - 1 : -1] for model in (student, teacher))
        logp, logq = logp.log_softmax(-1), logq.log_softmax(-1).detach()
        total, count = total + (logq.exp() * (logq - logp)).sum(), count + len(logp)
    (0.3 * total / count).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert backend.forwards == [2]
    assert float((found - expected).norm() / expected.norm()) < 1e-5


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"on_policy_share": 1.5},
            "model.sampler.on_policy_share\n    got:      1.5\n    expected: from 0 to 1",
        ),
        (
            {"on_policy_share": float("nan")},
            "model.sampler.on_policy_share\n    got:      nan\n    expected: from 0 to 1",
        ),
        ({"column": ""}, "model.sampler.column\n    got:      ''\n    expected: a column of the dataset"),
        (
            {"sampler": FakeSampler(group_size=4)},
            "model.sampler.sampler.group_size: a prompt has one given completion, not a group of them\n"
            "    got:      4\n"
            "    expected: 1\n"
            "    try:      model.sampler.sampler.group_size: 1, and as many times the data.prompts_per_step",
        ),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MixedSampler(**{"sampler": FakeSampler(group_size=1), **arguments})
    assert str(caught.value) == text


BAD_ROWS = {
    "no column": (
        {"answer": "2", "solution": "4"},
        "the dataset has no column 'completion'",
        "columns 'answer', 'solution'",
        "a text",
        "data.train.columns: {completion: THEIR_COLUMN}, or model.sampler.column",
    ),
    "null": ({"completion": None}, "no completion in this row", "None", "a text", "repair or remove the row"),
    "blank": ({"completion": " \n"}, "no completion in this row", "' \\n'", "a text", "repair or remove the row"),
    "a number": ({"completion": 4}, "no completion in this row", "4", "a text", "repair or remove the row"),
    "goes on": (
        {"completion": "1<eos>2"},
        "the completion goes on after an end token",
        "'<eos>' before its end",
        "one, at its end",
        None,
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_without_a_usable_completion_is_named(name: str) -> None:
    row, what, got, expected, hint = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        list(mixed(0.0).sample([replace(one_by_one(1)[0], row=row)]))
    text = f"data.train, column 'completion', the row of prompt '0+0=': {what}\n    got:      {got}\n"
    text += f"    expected: {expected}" + (f"\n    try:      {hint}" if hint else "")
    assert str(caught.value) == text


def test_a_bad_row_is_refused_before_its_turn() -> None:
    requests = one_by_one(40)
    part = mixed(0.5)
    students = next(i for i, r in enumerate(requests) if not given(list(part.sample([r]))))
    requests[students] = replace(requests[students], row={"completion": ""})
    with pytest.raises(DataError, match="no completion in this row"):
        list(part.sample(requests))
    assert len(list(mixed(1.0).sample(requests))) == 40


def test_a_token_that_the_models_do_not_share() -> None:
    part = MixedSampler(sampler=FakeSampler(group_size=1), on_policy_share=0.0)
    part.setup(replace(student_info(), vocab_limit=30))
    with pytest.raises(DataError) as caught:
        list(part.sample(one_by_one(1, "1z")))
    assert str(caught.value) == (
        "data.train, column 'completion', the row of prompt '0+0=': a token that the models do not share\n"
        "    got:      ids [94]\n"
        "    expected: ids below 30, those of student and teacher"
    )


def test_sampling_before_setup() -> None:
    with pytest.raises(RolloutError) as caught:
        list(MixedSampler(sampler=FakeSampler(group_size=1)).sample(one_by_one(1)))
    assert str(caught.value) == (
        "MixedSampler.sample\n    got:      no student yet\n    expected: setup(info) before it"
    )


def test_only_numbers_that_reach_a_step_can_be_scheduled() -> None:
    sampler = MixedSampler(sampler=toy.RandomSampler(group_size=1), on_policy_share=0.5)
    with pytest.raises(ConfigError) as caught:
        build(divergence=JSD(), sampler=sampler, schedules={"sampler.on_policy_share": Constant(value=0.5)})
    assert str(caught.value).startswith("model.schedules.sampler.on_policy_share: no such number\n")
    build(divergence=JSD(), sampler=sampler, schedules={"sampler.temperature": Constant(value=0.5)})


def test_estimates_of_the_students_own_samples_are_refused_for_the_reference_too() -> None:
    sampler = MixedSampler(sampler=toy.RandomSampler(group_size=1))
    reference = build(divergence=JSD()).parts.teacher
    with pytest.raises(ConfigError) as caught:
        build(
            divergence=JSD(),
            sampler=sampler,
            reference=reference,
            reference_divergence=K2(),
            reference_beta=Constant(value=0.1),
        )
    assert str(caught.value) == (
        "model.reference_divergence: K2 is an estimate over the student's own samples, and the sampler MixedSampler "
        "also gives tokens of others\n"
        "    got:      sampled log-probs\n"
        "    expected: a divergence of whole distributions or of top-k tokens\n"
        "    try:      model.reference_divergence: jsd"
    )


# ---- GKD from the command line

GKD = [
    "fit", "--config", "quickstart", "--run_dir", "run", "--trainer.max_steps", "2",
    "--trainer.val_check_interval", "2",
    "--data.prompts_per_step", "8", "--data.val.0.source.limit", "8", "--trainer.accelerator", "cpu",
    "--data.train.columns.completion", "chain", "--model.objective", "null", "--model.rewards", "[answer]",
    "--model.rewards.0.after", ">", "--model.divergence", "jsd",
    "--model.sampler", json.dumps({"name": "mixed", "sampler": {"name": "hf", "group_size": 1, "max_new_tokens": 24}}),
]  # fmt: skip


@pytest.mark.slow
def test_gkd_runs_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*GKD, "--model.sampler.on_policy_share", "0.5"]) == 0
    with open("run/metrics.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["train/grad_norm"]) > 0 for row in rows[1:])
    recorded = [json.loads(line) for line in Path("run/rollouts/step-000002.jsonl").read_text().splitlines()]
    unknown = [rollout["tokens"]["behaviour_logprobs"][0] is None for rollout in recorded]
    assert 0 < sum(unknown) < len(unknown) == 8
    tokenizer = AutoTokenizer.from_pretrained(embedded.resolve("embedded:student"))
    for rollout, is_given in zip(recorded, unknown, strict=True):
        if is_given:
            assert rollout["correct"] is True
            assert tokenizer.decode(rollout["tokens"]["id"], skip_special_tokens=True) == rollout["text"]
