"""rollouts/step-*.jsonl: strict JSON of what the step did, read back as it was, refused where it is damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distillkit.errors import DataError, ShapeError
from distillkit.reporting.rollouts import read_rollouts, rollout_files, token_texts, write_rollouts
from distillkit.types import RolloutBatch, StepOutput
from tests.reporting.conftest import Step


def strict(line: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    loaded: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return loaded


def test_one_line_per_rollout_with_everything_of_it(tmp_path: Path, step: Step) -> None:
    path = write_rollouts(tmp_path / "rollouts", step.output, step.tokenizer, 12)
    assert path == tmp_path / "rollouts" / "step-000012.jsonl"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    first, second, third, fourth = map(strict, path.read_text().splitlines())
    assert second == {
        "schema_version": 1,
        "step": 12,
        "group_id": 10,
        "prompt": "3+4>",
        "gold": "7",
        "text": "12",
        "finish_reason": "length",
        "rewards": {"answer": 0.0, "format": None},
        "status": {"answer": "scored", "format": "not_applicable"},
        "total": 0.0,
        "correct": False,
        "answer": "12",
        "advantage": -1.0,
        "tokens": {
            "text": ["1", "2"],
            "id": step.tokenizer("12")["input_ids"],
            "sampled": [True, True],
            "student_logprobs": [-0.5, -1.0],
            "behaviour_logprobs": [-0.25, -0.5],
            "teacher_logprobs": [-4.5, -1.75],
            "distil_weight": [1.0, 0.0],
            "divergence": [8.0, 0.28125],
            "advantages": [-1.0, -1.0],
        },
    }
    assert first["tokens"]["text"] == ["7", "<eos>"] and first["tokens"]["student_logprobs"] == [-0.1, -0.2]
    assert first["rewards"] == {"answer": 1.0, "format": 0.5} and first["total"] == pytest.approx(1.05, abs=1e-6)
    assert third["advantage"] == -0.5 and third["status"]["answer"] == "unparseable" and third["answer"] is None
    assert (fourth["total"], fourth["correct"], fourth["rewards"]["answer"]) == (None, None, None)
    assert fourth["tokens"]["student_logprobs"] == [None, None] and fourth["tokens"]["divergence"] == [None, None]
    assert fourth["tokens"]["teacher_logprobs"] == [-0.5, pytest.approx(-3.4028235e38)]


def test_read_rollouts_gives_back_what_was_written(tmp_path: Path, step: Step) -> None:
    read = read_rollouts(write_rollouts(tmp_path, step.output, step.tokenizer, 3))
    batch, per_token = step.output.rollouts, step.output.per_token
    for i, rollout in enumerate(read):
        start, end = int(batch.prompt_lengths[i]), int(batch.lengths[i])
        assert rollout.token_ids == tuple(batch.completion_ids(i).tolist())
        assert set(rollout.per_token) == {*per_token, "behaviour_logprobs"}
        for name, values in {**per_token, "behaviour_logprobs": batch.behaviour_logprobs}.items():
            again = torch.tensor([math.nan if v is None else v for v in rollout.per_token[name]], dtype=torch.float32)
            assert torch.equal(again.nan_to_num(99.0), values[i, start:end].nan_to_num(99.0)), name
    assert read[3].per_token["teacher_logprobs"] == (-0.5, -math.inf)
    assert [rollout.correct for rollout in read] == [True, False, False, None]
    assert [rollout.group_id for rollout in read] == [10, 10, 11, 11] and {rollout.step for rollout in read} == {3}


def test_log_ratios_take_the_student_of_the_update_then_of_the_sampling(tmp_path: Path, step: Step) -> None:
    read = read_rollouts(write_rollouts(tmp_path, step.output, step.tokenizer, 1))
    assert read[1].log_ratios == (-4.0, -0.75) and read[1].mean_log_ratio == -2.375
    assert read[3].log_ratios == (-0.25, -math.inf)  # not in the update: behaviour -0.25, -0.5
    without = replace(step.output, per_token={"student_logprobs": step.output.per_token["student_logprobs"]})
    alone = read_rollouts(write_rollouts(tmp_path, without, step.tokenizer, 1))[1]
    assert alone.log_ratios == (None, None) and alone.mean_log_ratio is None and alone.advantage is None


def test_tokens_that_the_student_did_not_sample_have_no_values(tmp_path: Path, step: Step) -> None:
    mask = step.output.rollouts.loss_mask.clone()
    mask[0, 4] = False
    output = replace(step.output, rollouts=replace(step.output.rollouts, loss_mask=mask))
    (rollout,) = read_rollouts(write_rollouts(tmp_path, output, step.tokenizer, 1, limit=1))
    assert rollout.sampled == (False, True) and rollout.token_texts == ("7", "<eos>")
    assert all(values[0] is None and values[1] is not None for values in rollout.per_token.values())


def test_limit_rank_gold_column_and_a_step_without_rewards(tmp_path: Path, step: Step) -> None:
    output = replace(step.output, rewards=None, per_token={})
    path = write_rollouts(tmp_path, output, step.tokenizer, 7, limit=3, rank=2, gold_column="solution")
    assert path.name == "step-000007-rank2.jsonl"
    read = read_rollouts(path)
    assert len(read) == 3 and read[0].gold is None
    assert (read[0].rewards, read[0].status, read[0].total, read[0].correct) == ({}, {}, None, None)
    assert set(read[0].per_token) == {"behaviour_logprobs"}
    assert read_rollouts(write_rollouts(tmp_path, output, step.tokenizer, 8, limit=0)) == []


def test_files_are_listed_by_step_and_rank(tmp_path: Path, step: Step) -> None:
    for number in (2, 1_000_000, 10):
        for rank in (11, 2, 0):
            write_rollouts(tmp_path, step.output, step.tokenizer, number, rank=rank, limit=1)
    (tmp_path / "step-notes.jsonl").write_text("")
    (tmp_path / ".step-000003.jsonl.tmp").write_text("")
    found = rollout_files(tmp_path)
    assert list(found) == [2, 10, 1_000_000]
    assert [p.name for p in found[10]] == ["step-000010.jsonl", "step-000010-rank2.jsonl", "step-000010-rank11.jsonl"]
    assert rollout_files(tmp_path / "missing") == {}


def test_rows_and_prompts_of_any_kind_stay_strict_json(
    tmp_path: Path, make_batch: Callable[..., RolloutBatch], tokenizer: PreTrainedTokenizerFast
) -> None:
    gold = {"value": math.nan, "on": date(2026, 1, 2), "list": (1, math.inf, "\ud800"), 3: None, "yes": True}
    batch = make_batch(("3>", ["7<eos>"]), rows=[{"answer": gold}])
    messages = [{"role": "user", "content": "é\u2028"}]
    output = StepOutput(rollouts=replace(batch, prompts=(messages,)), rewards=None, metrics={})
    path = write_rollouts(tmp_path, output, tokenizer, 1)
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 2 and lines[1] == b""
    record = strict(lines[0].decode())
    assert record["prompt"] == messages
    assert record["gold"] == {"value": None, "on": "2026-01-02", "list": [1, None, "\ud800"], "3": None, "yes": True}
    assert read_rollouts(path)[0].prompt == messages


def test_a_per_token_tensor_of_another_shape_is_refused_and_nothing_written(tmp_path: Path, step: Step) -> None:
    output = replace(step.output, per_token={"divergence": torch.zeros(4, 2)})
    with pytest.raises(ShapeError) as caught:
        write_rollouts(tmp_path / "rollouts", output, step.tokenizer, 1)
    assert str(caught.value) == (
        "StepOutput.per_token['divergence']\n    got:      (4, 2)\n    expected: (4, 6), rollouts x tokens"
    )
    assert not (tmp_path / "rollouts").exists()


def _tokenizer(vocabulary: list[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_token_texts_of_a_byte_level_tokenizer() -> None:
    # Byte-level alphabet: "Ġ" is the space, "Ã" and "©" the bytes 0xC3 and 0xA9 of "é".
    tokenizer = _tokenizer(["Ġthe", "the", "Ã", "©", "Ã©", "Ċ"], decoders.ByteLevel())
    assert tokenizer.decode([2, 3]) == "é"
    texts = token_texts([1, 0, 2, 3, 4, 5, 6, 99], tokenizer)
    assert texts == ["the", " the", "\ufffd", "\ufffd", "é", "\n", "<eos>", "<id 99>"]


def test_token_texts_of_a_sentencepiece_tokenizer_keep_the_leading_space() -> None:
    tokenizer = _tokenizer(["▁the", "the", "▁", "s"], decoders.Metaspace())
    assert tokenizer.decode([0]) == "the"
    assert token_texts([0, 1, 2, 3], tokenizer) == [" the", "the", " ", "s"]


def _damaged(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: json.dumps(r)[:-20],
            "no JSON\n    got:      Unterminated string starting at",
        ),
        (lambda r: json.dumps(r).replace("-0.5", "NaN", 1), "no JSON\n    got:      NaN is no JSON number\n"),
        (
            lambda r: _damaged(r, schema_version=2),
            "schema_version\n    got:      2\n    expected: 1\n"
            "    try:      the distillkit that wrote the file; docs/run_folder.md describes version 1",
        ),
        (lambda r: "[1]", "schema_version\n    got:      list\n    expected: 1\n"),
        (lambda r: "{}", "schema_version\n    got:      None\n    expected: 1\n"),
        (
            lambda r: json.dumps({k: v for k, v in r.items() if k != "correct"}),
            "correct\n    got:      nothing\n    expected: true, false or null",
        ),
        (lambda r: _damaged(r, correct=1), "correct\n    got:      1\n    expected: true, false or null"),
        (lambda r: _damaged(r, step=-1), "step\n    got:      -1\n    expected: an integer from 0"),
        (lambda r: _damaged(r, rewards=[1]), "rewards\n    got:      [1]\n    expected: name -> number or null"),
        (
            lambda r: _damaged(r, finish_reason="eos"),
            "finish_reason\n    got:      'eos'\n    expected: 'stop' or 'length'",
        ),
        (
            lambda r: _damaged(r, tokens={**r["tokens"], "id": 3}),
            "tokens.id\n    got:      3\n    expected: a list of integers from 0",
        ),
        (
            lambda r: _damaged(r, tokens={**r["tokens"], "divergence": ["a", None]}),
            "tokens.divergence\n    got:      ['a', None]\n    expected: a list of numbers or null",
        ),
        (
            lambda r: _damaged(r, tokens={**r["tokens"], "divergence": [1.0]}),
            "tokens.divergence\n    got:      1 entries\n    expected: 2, one per token",
        ),
    ],
)
def test_a_damaged_line_is_named(
    tmp_path: Path, step: Step, change: Callable[[dict[str, Any]], str], message: str
) -> None:
    path = write_rollouts(tmp_path, step.output, step.tokenizer, 1)
    lines = path.read_text().splitlines()
    lines[1] = change(strict(lines[1]))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        read_rollouts(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.jsonl"
    with pytest.raises(DataError) as caught:
        read_rollouts(path)
    assert str(caught.value) == f"{path}: no such file\n    expected: a rollouts/step-<step>.jsonl of a run"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=":1: no JSON"):
        read_rollouts(path)
