"""The fakes are what their docstrings say."""

from __future__ import annotations

import math

import torch

from distillkit.testing import (
    FakeSampler,
    FakeTeacher,
    char_tokenizer,
    encode,
    reward_output,
    rollout_batch,
    sample_requests,
    student_info,
    tiny_model,
    tiny_student,
)
from distillkit.testing.fakes import VOCABULARY
from distillkit.types import CORRECT, UNKNOWN, WRONG, ScoreRequest


def test_tokenizer_and_encode_agree() -> None:
    tokenizer = char_tokenizer()
    text = "".join(VOCABULARY[3:])
    assert tuple(tokenizer(text)["input_ids"]) == encode(text)
    assert tokenizer.decode(list(encode(text))) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert encode("é") == (2,)
    chat = [{"role": "user", "content": "1+1="}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "1+1="


def test_rollout_batch_by_hand() -> None:
    batch = rollout_batch({"1+1=": ["2", "#2"], "3=": ["long tail"]}, max_new_tokens=4, observation="#")
    assert batch.tokens.tolist() == [
        [*encode("1+1=2"), 1, 0],
        [*encode("1+1=#2"), 1],
        [*encode("3=long"), 0],
    ]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0]]
    assert batch.finish_reason == ("stop", "stop", "length")
    assert batch.texts == ("2", "#2", "long tail") and batch.prompts == ("1+1=", "1+1=", "3=")
    assert batch.group_id.tolist() == [11, 11, 6]
    assert [row["answer"] for row in batch.rows] == ["2", "2", "3"]


def test_default_batch_has_what_suites_need() -> None:
    batch = rollout_batch(observation="#")
    assert len(set(batch.lengths.tolist())) > 2 and set(batch.finish_reason) == {"stop", "length"}
    assert (batch.loss_mask != batch.attention_mask)[:, 6:].any()  # tool tokens within completions
    assert len(set(batch.prompt_lengths.tolist())) > 1
    assert any(text == row["answer"] for text, row in zip(batch.texts, batch.rows, strict=True))


def test_reward_output_default() -> None:
    rewards = reward_output(4)
    assert rewards.correct.tolist() == [CORRECT, WRONG, WRONG, UNKNOWN]
    assert rewards.total.tolist()[:3] == [1.0, 0.0, 0.25] and math.isnan(rewards.total[3])
    assert rewards.status == (("scored", "scored", "scored", "timed_out"),)


def test_fake_teacher_by_hand() -> None:
    batch = rollout_batch({"1=": ["2", "3"]})
    logits = [0.0] * 99
    logits[encode("2")[0]] = math.log(99)  # 99 of 197 shares
    teacher = FakeTeacher(logits=tuple(logits), blind_to="3")
    scores = teacher.score(batch, ScoreRequest(sampled=True, topk=2, entropy=True, full=True))
    assert scores.sampled is not None and scores.topk is not None and scores.topk_ids is not None
    assert math.isclose(scores.sampled[0, 2].item(), math.log(99 / 197), rel_tol=1e-6)
    assert math.isclose(scores.sampled[0, 3].item(), math.log(1 / 197), rel_tol=1e-6)
    assert scores.topk_ids[0, 2, 0] == encode("2")[0]
    assert scores.valid.tolist() == [[False, False, True, True], [False, False, False, True]]
    assert scores.hidden is not None and scores.head is not None
    assert torch.equal(scores.head(scores.hidden[0])[1], torch.tensor(logits))
    cold = teacher.score(batch, ScoreRequest(sampled=True, temperature=0.5))
    assert cold.sampled is not None and cold.hidden is None
    assert math.isclose(cold.sampled[0, 2].item(), math.log(99**2 / (99**2 + 98)), rel_tol=1e-4)


def test_fake_sampler_speaks_in_turn() -> None:
    sampler = FakeSampler(completions=("a", "bb", "longer"), group_size=2, max_new_tokens=3)
    requests = sample_requests(["x", "y"], group_size=2, max_new_tokens=3)
    groups = list(sampler.sample(requests))
    assert [r.text for g in groups for r in g.rollouts] == ["bb", "longer", "longer", "a"]  # seeds 100 and 101
    assert groups[0].rollouts[1].finish_reason == "length" and groups[0].rollouts[0].finish_reason == "stop"
    assert groups[0].rollouts[0].behaviour_logprobs.isnan().all()


def test_tiny_models_are_reproducible_and_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = tiny_model(0), tiny_model(0), tiny_model(1)
    assert torch.equal(before, torch.random.get_rng_state())
    ids = torch.tensor([encode("1+1=")])
    assert torch.equal(one(input_ids=ids).logits, same(input_ids=ids).logits)
    assert not torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
    assert sum(p.numel() for p in one.parameters()) < 20_000
    assert tiny_student().vocab_limit == student_info().vocab_limit == len(VOCABULARY)
