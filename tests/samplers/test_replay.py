"""`replay`: recorded completions, and what is said about a record that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distillkit.errors import ConfigError, DataError, RolloutError
from distillkit.samplers.replay import ReplaySampler
from distillkit.types import Rollout, RolloutBatch, SampleRequest
from tests.samplers.tiny import EOS, info, requests

CHAT = [{"role": "user", "content": "2+2="}]


def write(folder: Path, *records: object) -> str:
    path = folder / "recorded.jsonl"
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def replay(path: str, **settings: Any) -> ReplaySampler:
    made = ReplaySampler(path=path, **settings)
    made.setup(info())
    made.sync(SimpleNamespace())
    return made


def request(prompt: Any = "1+1=", **changes: Any) -> SampleRequest:
    (one,) = requests([3], group_size=changes.pop("group_size", 2), max_new_tokens=changes.pop("max_new_tokens", 12))
    return replace(one, prompt=prompt, **changes)


def rollouts(made: ReplaySampler, *asked: SampleRequest) -> list[tuple[Rollout, ...]]:
    groups = list(made.sample(asked))
    assert [g.request for g in groups] == list(asked)
    return [g.rollouts for g in groups]


def test_texts_are_tokenised_and_ended(tmp_path: Path) -> None:
    record = {"prompt": "1+1=", "completions": ["#$", "$", "unused"], "label": [1, 0, 0]}
    ((right, wrong),) = rollouts(replay(write(tmp_path, "", record)), request())
    assert (right.text, right.completion_ids.tolist(), right.finish_reason) == ("#$", [4, 5, EOS], "stop")
    assert (wrong.text, wrong.completion_ids.tolist(), wrong.finish_reason) == ("$", [5, EOS], "stop")
    assert right.behaviour_logprobs.isnan().all() and right.behaviour_logprobs.dtype == torch.float32
    assert right.loss_mask.all() and right.policy_version.tolist() == [-1, -1, -1]


def test_a_batch_can_be_made_of_replayed_groups(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "completions": ["#", "$$$"]}, {"prompt": CHAT, "completions": ["%", "&"]})
    groups = list(replay(path).sample([request(), request(CHAT)]))
    batch = RolloutBatch.from_groups(groups, pad_id=0)
    assert batch.texts == ("#", "$$$", "%", "&") and batch.completion_lengths.tolist() == [2, 4, 2, 2]
    assert batch.behaviour_logprobs[batch.loss_mask].isnan().all()


def test_an_end_token_in_the_text_is_not_doubled(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "completions": ["#<eos>", "$"]})
    ((ended, bare),) = rollouts(replay(path, append_eos=False), request())
    assert (ended.text, ended.completion_ids.tolist(), ended.finish_reason) == ("#", [4, EOS], "stop")
    assert (bare.text, bare.completion_ids.tolist(), bare.finish_reason) == ("$", [5], "length")
    ((ended, _),) = rollouts(replay(path), request())
    assert ended.completion_ids.tolist() == [4, EOS]


def test_ids_and_logprobs_are_taken_as_they_are(tmp_path: Path) -> None:
    record = {"prompt": "1+1=", "completion_ids": [[4, 5, EOS], [6, 7]], "logprobs": [[-0.5, -1, -2.25], [-3, -4]]}
    ((first, second),) = rollouts(replay(write(tmp_path, record)), request())
    assert first.completion_ids.tolist() == [4, 5, EOS] and first.behaviour_logprobs.tolist() == [-0.5, -1.0, -2.25]
    assert (first.text, first.finish_reason) == ("#$", "stop")
    assert (second.text, second.finish_reason) == ("%&", "length")
    assert second.behaviour_logprobs.dtype == torch.float32 and second.behaviour_logprobs.tolist() == [-3.0, -4.0]


def test_a_long_completion_is_cut_and_counts_as_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "completion_ids": [[4, 5, 6, EOS]], "logprobs": [[-1, -2, -3, -4]]})
    (((cut,),),) = (rollouts(replay(path), request(group_size=1, max_new_tokens=3)),)
    assert cut.completion_ids.tolist() == [4, 5, 6] and cut.behaviour_logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert (cut.text, cut.finish_reason) == ("#$%", "length")
    path = write(tmp_path, {"prompt": "1+1=", "completions": ["#$%"]})
    ((cut,),) = rollouts(replay(path), request(group_size=1, max_new_tokens=3))
    assert (cut.completion_ids.tolist(), cut.text, cut.finish_reason) == ([4, 5, 6], "#$%", "length")


def test_records_match_by_messages_or_by_a_column(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": [{"content": "2+2=", "role": "user"}], "completions": ["%"], "id": 7},
        {"prompt": "line\u2028break", "completions": ["&"], "id": "x"},
    )
    asked = [request(CHAT, group_size=1), request("line\u2028break", group_size=1)]
    assert [rows[0].text for rows in rollouts(replay(path), *asked)] == ["%", "&"]
    asked = [request("any", row={"id": "x"}, group_size=1), request("any", row={"id": 7}, group_size=1)]
    assert [rows[0].text for rows in rollouts(replay(path, key="id"), *asked)] == ["&", "%"]


LINES: dict[str, tuple[object, str]] = {
    "not JSON": (
        '{"prompt": ',
        "PATH, line 2: not JSON (Expecting value: line 1 column 12 (char 11))\n"
        '    got:      {"prompt": \n'
        '    try:      {"prompt": "1+1=", "completions": ["2", "3"]}',
    ),
    "not an object": (
        ["1+1="],
        "PATH, line 2: no prompt to match\n"
        "    got:      list\n"
        "    expected: an object with 'prompt'\n"
        '    try:      {"prompt": "1+1=", "completions": ["2", "3"]}',
    ),
    "no key": (
        {"question": "1", "completions": []},
        "PATH, line 2: no prompt to match\n"
        "    got:      fields 'question', 'completions'\n"
        "    expected: an object with 'prompt'\n"
        '    try:      {"prompt": "1+1=", "completions": ["2", "3"]}',
    ),
    "no completions": (
        {"prompt": "2"},
        "PATH, line 2: one kind of completions\n    got:      neither\n    expected: completions or completion_ids",
    ),
    "both": (
        {"prompt": "2", "completions": ["a"], "completion_ids": [[4]]},
        "PATH, line 2: one kind of completions\n    got:      both\n    expected: completions or completion_ids",
    ),
    "texts": (
        {"prompt": "2", "completions": "a"},
        "PATH, line 2: 'completions'\n"
        "    got:      'a'\n"
        "    expected: a list of texts\n"
        '    try:      {"prompt": "1+1=", "completions": ["2", "3"]}',
    ),
    "ids": (
        {"prompt": "2", "completion_ids": [[4, 1.5]]},
        "PATH, line 2: 'completion_ids'\n    got:      [[4, 1.5]]\n    expected: a list of lists of token ids",
    ),
    "logprobs": (
        {"prompt": "2", "completion_ids": [[4, 5]], "logprobs": [[-1]]},
        "PATH, line 2: 'logprobs'\n"
        "    got:      [[-1]]\n"
        "    expected: lists of numbers, one per token of completion_ids",
    ),
    "logprobs of texts": (
        {"prompt": "2", "completions": ["a"], "logprobs": [[-1]]},
        "PATH, line 2: 'logprobs'\n"
        "    got:      [[-1]]\n"
        "    expected: lists of numbers, one per token of completion_ids",
    ),
    "twice": (
        {"prompt": "1+1=", "completions": ["$"]},
        "PATH, line 2: the same 'prompt' as line 1\n"
        "    got:      1+1=\n"
        "    try:      one line per prompt, with all its completions",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_at_the_start(name: str, tmp_path: Path) -> None:
    record, expected = LINES[name]
    path = write(tmp_path, {"prompt": "1+1=", "completions": ["#"]}, record)
    with pytest.raises(DataError) as error:
        replay(path)
    assert str(error.value) == expected.replace("PATH", path)
    assert error.value.exit_code == 2


COMPLETIONS: dict[str, tuple[dict[str, object], str]] = {
    "unknown id": (
        {"completion_ids": [[4, 48, -1]]},
        "PATH, line 1: completion 0 has unknown token ids\n"
        "    got:      [48, -1]\n"
        "    expected: ids from 0 to 47, those of the student",
    ),
    "empty": (
        {"completion_ids": [[]]},
        "PATH, line 1: completion 0 has no token\n"
        "    expected: at least one token\n"
        "    try:      leave it out, or model.sampler.append_eos: true",
    ),
    "goes on": (
        {"completion_ids": [[4, EOS, 5]]},
        "PATH, line 1: completion 0 goes on after an end token\n"
        "    got:      id 1\n"
        "    expected: an end token at its end only",
    ),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_completion_that_the_student_cannot_have_written_is_named(name: str, tmp_path: Path) -> None:
    record, expected = COMPLETIONS[name]
    path = write(tmp_path, {"prompt": "1+1=", **record})
    with pytest.raises(DataError) as error:
        rollouts(replay(path), request(group_size=1))
    assert str(error.value) == expected.replace("PATH", path)


def test_a_prompt_without_a_record(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "completions": ["#", "$"]})
    with pytest.raises(RolloutError) as error:
        rollouts(replay(path), request(), request("1+2="))
    assert str(error.value) == (
        f"{path}: group 50: no recorded completions for this prompt\n"
        "    got:      prompt = 1+2=\n"
        "    expected: one of the 1 records' 'prompt'\n"
        "    try:      record it, or set model.sampler.key to a column that both files share"
    )


def test_too_few_completions(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1+1=", "completions": ["#", "$"]})
    with pytest.raises(RolloutError) as error:
        rollouts(replay(path), request(group_size=3))
    assert str(error.value) == (
        f"{path}, line 1: too few completions\n"
        "    got:      2\n"
        "    expected: at least 3 (the group size)\n"
        "    try:      model.sampler.group_size: 2"
    )


def test_a_column_that_the_dataset_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": 7, "completions": ["#", "$"]})
    with pytest.raises(RolloutError) as error:
        rollouts(replay(path, key="id"), request())
    assert str(error.value) == (
        f"{path}: group 50: the dataset row has no column 'id'\n"
        "    got:      columns 'number'\n"
        "    try:      model.sampler.key: a column of the dataset, or prompt"
    )


def test_a_file_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        replay("nowhere.jsonl")
    assert str(error.value) == (
        "model.sampler.path: cannot read it\n"
        "    got:      nowhere.jsonl ([Errno 2] No such file or directory: 'nowhere.jsonl')\n"
        "    expected: a UTF-8 JSONL file of recorded completions"
    )
    path = write(tmp_path, "")
    with pytest.raises(DataError) as error:
        replay(path)
    assert str(error.value) == (
        f"{path}: no record\n"
        "    expected: at least one line\n"
        '    try:      {"prompt": "1+1=", "completions": ["2", "3"]}'
    )


def test_arguments_and_order_of_calls() -> None:
    with pytest.raises(ConfigError) as error:
        ReplaySampler(path="")
    assert str(error.value) == "model.sampler.path\n    got:      ''\n    expected: a non-empty text"
    with pytest.raises(RolloutError) as early:
        list(ReplaySampler(path="x").sample([request()]))
    assert str(early.value) == (
        "ReplaySampler.sample\n    got:      no records yet\n    expected: setup(info) before it"
    )
    assert not ReplaySampler.same_engine
