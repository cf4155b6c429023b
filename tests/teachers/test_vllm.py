"""The `vllm` teacher against a server that answers like vLLM and fails on demand; tests/engines has the real one."""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.components import StudentInfo
from distillkit.errors import ConfigError, ModelError, ScoringError
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.local import LocalTeacher
from distillkit.teachers.vllm import VLLMTeacher
from distillkit.testing import char_tokenizer, rollout_batch, student_info, tiny_model
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores
from tests.teachers.fake_vllm import Behaviour, FakeVLLM, changed, die, hang_up, running, status, waits

SAMPLED = ScoreRequest(sampled=True)
TOP = ScoreRequest(sampled=True, topk=5)
Tiny = Any


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher's checkpoint folder."""
    return save(tiny_model(5), tmp_path_factory.mktemp("teacher"))


def save(model: Tiny, folder: Path) -> str:
    model.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


def padded(extra: int) -> Tiny:
    """The tiny model with `extra` more rows in its head, whose logits are 0."""
    model = tiny_model(5)
    config = copy.deepcopy(model.config)
    config.vocab_size, config.tie_word_embeddings = config.vocab_size + extra, False
    wide = type(model)(config).eval()
    weights: dict[str, Any] = dict(model.state_dict())
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, table[:1].expand(extra, -1)])
    weights["lm_head.weight"] = torch.cat([table, torch.zeros(extra, table.shape[1])])
    wide.load_state_dict(weights)
    return wide


def teacher(fakes: list[FakeVLLM], path: str, **settings: Any) -> VLLMTeacher:
    quick: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 30.0, "max_wait_s": 30.0, "concurrency": 4}
    return VLLMTeacher(urls=tuple(fake.url for fake in fakes), path=path, **{**quick, **settings})


@contextmanager
def ready(path: str, *fakes: FakeVLLM, info: StudentInfo | None = None, **settings: Any) -> Iterator[VLLMTeacher]:
    """A teacher after its start-up check, which the servers have forgotten."""
    with running(*fakes) as started:
        part = teacher(started, path, **settings)
        try:
            part.setup(student_info() if info is None else info)
            for fake in fakes:
                fake.forget()
            yield part
        finally:
            part.teardown()


def local(path: str, batch: RolloutBatch, request: ScoreRequest, info: StudentInfo | None = None) -> TeacherScores:
    part = LocalTeacher(path=path)
    part.setup(student_info() if info is None else info)
    return part.score(batch, request)


def same(ours: TeacherScores, theirs: TeacherScores) -> None:
    assert torch.equal(ours.valid, theirs.valid)
    assert ours.sampled is not None and theirs.sampled is not None
    torch.testing.assert_close(ours.sampled, theirs.sampled, rtol=0, atol=1e-5)
    if ours.topk is None or theirs.topk is None:
        assert ours.topk is theirs.topk is None
    else:
        torch.testing.assert_close(ours.topk, theirs.topk, rtol=0, atol=1e-5)
        assert torch.equal(ours.topk_ids, theirs.topk_ids)


def rows(batch: RolloutBatch) -> Counter[tuple[int, ...]]:
    """What should be asked: every rollout up to its last scored token."""
    ends = [int(mask.nonzero()[-1]) + 1 for mask in batch.loss_mask]
    return Counter(tuple(tokens[:end].tolist()) for tokens, end in zip(batch.tokens, ends, strict=True))


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("servers", [1, 3])
def test_scores_are_the_local_teachers(path: str, concurrency: int, servers: int) -> None:
    batch = rollout_batch(observation="#")
    fakes = [FakeVLLM(tiny_model(5)) for _ in range(servers)]
    with ready(path, *fakes, concurrency=concurrency) as part:
        for request in (SAMPLED, TOP, ScoreRequest(sampled=True, topk=20)):
            same(part.score(batch, request), local(path, batch, request))
        order = torch.tensor([7, 3, 0, 11])
        same(part.score(batch.select(order), TOP), local(path, batch.select(order), TOP))


def test_every_rollout_is_asked_for_once_by_its_own_ids(path: str) -> None:
    batch, fake = rollout_batch(observation="#"), FakeVLLM(tiny_model(5))
    with ready(path, fake) as part:
        part.score(batch, TOP)
    assert Counter(fake.asked) == rows(batch)


def test_nothing_is_asked_about_rollouts_without_a_sampled_token(path: str) -> None:
    batch, fake = rollout_batch(), FakeVLLM(tiny_model(5))
    mask = batch.loss_mask.clone()
    mask[2:] = False
    with ready(path, fake) as part:
        scores = part.score(replace(batch, loss_mask=mask), SAMPLED)
        assert len(fake.asked) == 2 and not scores.valid[2:].any()
        none = part.score(replace(batch, loss_mask=torch.zeros_like(mask)), TOP)
    assert len(fake.asked) == 2 and not none.valid.any()


def test_a_token_without_a_prefix_is_not_valid(path: str) -> None:
    batch = rollout_batch({"1+1=": ["2"]})
    mask = batch.loss_mask.clone()
    mask[:, 0] = True
    with ready(path, FakeVLLM(tiny_model(5))) as part:
        scores = part.score(replace(batch, loss_mask=mask), TOP)
    same(scores, local(path, batch, TOP))


def test_groups_may_be_scored_from_several_threads(path: str) -> None:
    batch = rollout_batch()
    groups = [torch.arange(i, i + 4) for i in (0, 4, 8)]
    fakes = [FakeVLLM(tiny_model(5)) for _ in range(2)]
    with ready(path, *fakes) as part, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda index: part.score(batch.select(index), TOP), groups))
    for index, scores in zip(groups, found, strict=True):
        same(scores, local(path, batch.select(index), TOP))


def test_the_server_with_fewer_unanswered_requests_gets_the_next(path: str) -> None:
    batch, done = rollout_batch({"1+1=": ["2"]}), threading.Event()
    slow, quick = FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))
    with ready(path, slow, quick) as part, ThreadPoolExecutor(1) as threads:
        slow.always = waits(done)
        try:
            pending = threads.submit(lambda: [part.score(batch, SAMPLED) for _ in range(2)])  # one each, in turn
            while not slow.asked:
                assert not pending.done()
            before = len(quick.asked)
            for _ in range(6):
                part.score(batch, SAMPLED)
            assert (len(slow.asked), len(quick.asked) - before) == (1, 6)
        finally:
            done.set()


def test_a_server_has_no_more_unanswered_requests_than_it_may(path: str) -> None:
    batch, fake, dead = rollout_batch(), FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))
    lock, now, most = threading.Lock(), 0, 0

    def counted(fake: FakeVLLM, handler: Any, entries: dict[str, Any]) -> bool:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.02)
        with lock:
            now -= 1
        return False

    with ready(path, fake, dead, concurrency=3) as part, ThreadPoolExecutor(3) as threads:
        dead.kill()
        fake.always = counted
        list(threads.map(lambda _: part.score(batch, SAMPLED), range(3)))
    assert 1 < most <= 3


def test_a_request_that_nobody_waits_for_any_more_ends(path: str, caplog: pytest.LogCaptureFixture) -> None:
    fake, unwanted = FakeVLLM(tiny_model(5)), threading.Event()
    with ready(path, fake, max_wait_s=3600.0) as part, ThreadPoolExecutor(1) as threads:
        assert part._pool is not None
        fake.kill()
        pending = threads.submit(part._ask, part._pool, [5, 6, 7], [1, 2], 0, unwanted)
        while not any("no server answers" in record.message for record in caplog.records):
            threading.Event().wait(0.01)
        unwanted.set()
        with pytest.raises(ScoringError, match="scoring was ended"):
            pending.result(timeout=60)


@pytest.mark.parametrize(
    "failures",
    [
        [status(500)],
        [status(503)] * 3,
        [status(429, Retry_After="0.01"), status(408)],
        [hang_up],
        [status(500), hang_up, status(502), status(429)],
    ],
    ids=["500", "503 three times", "busy", "breaks off", "everything"],
)
def test_a_request_that_fails_is_sent_again(path: str, failures: list[Behaviour]) -> None:
    batch, fake = rollout_batch({"1+1=": ["2"]}), FakeVLLM(tiny_model(5))
    with ready(path, fake) as part:
        fake.plan = [*failures]
        same(part.score(batch, TOP), local(path, batch, TOP))
        # Beside the rollout the server may have been asked for the probe that every returned server is asked.
        assert fake.answered.count(next(iter(rows(batch)))) == 1


def test_a_request_that_always_fails_ends_the_run_with_the_reason(path: str) -> None:
    batch, fake = rollout_batch({"1+1=": ["2"]}), FakeVLLM(tiny_model(5))
    scored = next(iter(rows(batch)))

    def poisoned(fake: FakeVLLM, handler: Any, entries: dict[str, Any]) -> bool:
        return tuple(entries["prompt"]) == scored and status(500, "out of memory")(fake, handler, entries)

    with ready(path, fake, retries=2) as part:
        fake.always = poisoned
        with pytest.raises(ScoringError) as caught:
            part.score(batch, SAMPLED)
    assert str(caught.value) == (
        f"model.teacher.urls[0]: {fake.url} does not score, after 3 tries\n    got:      HTTP 500 out of memory"
    )
    assert fake.asked.count(scored) == 3


def test_a_late_answer_goes_to_another_server(path: str) -> None:
    batch, never = rollout_batch({"1+1=": ["2", "3"]}), threading.Event()
    fakes = [FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))]
    with ready(path, *fakes, timeout_s=2.0) as part:
        fakes[0].plan = [waits(never)] * 2
        try:
            same(part.score(batch, SAMPLED), local(path, batch, SAMPLED))
        finally:
            never.set()
        assert rows(batch) <= Counter(fakes[0].answered + fakes[1].answered)


def test_answers_that_never_come_in_time_say_what_to_change(path: str) -> None:
    batch, never = rollout_batch({"1+1=": ["2"]}), threading.Event()
    fake = FakeVLLM(tiny_model(5))
    with ready(path, fake, timeout_s=0.3, retries=0) as part:
        fake.always = waits(never)
        try:
            with pytest.raises(ScoringError, match=r"no whole answer within 0.3 s\n.*larger model.teacher.timeout_s"):
                part.score(batch, SAMPLED)
        finally:
            never.set()


def test_waiting_for_a_server_to_return_is_no_try(path: str, caplog: pytest.LogCaptureFixture) -> None:
    batch, fake = rollout_batch(), FakeVLLM(tiny_model(5))
    with ready(path, fake, retries=0) as part, ThreadPoolExecutor(1) as threads:
        fake.kill()
        pending = threads.submit(part.score, batch, SAMPLED)
        while not any("no server answers" in record.message for record in caplog.records):
            threading.Event().wait(0.01)
        fake.start()
        same(pending.result(timeout=60), local(path, batch, SAMPLED))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_dies_and_returns_loses_nothing(
    path: str, caplog: pytest.LogCaptureFixture, concurrency: int
) -> None:
    batch, fake = rollout_batch(), FakeVLLM(tiny_model(5))
    with ready(path, fake, concurrency=concurrency, backoff_s=0.05) as part, ThreadPoolExecutor(1) as threads:
        fake.plan = [None, None, None, None, None, die]
        pending = threads.submit(part.score, batch, TOP)
        while not any("no server answers" in record.message for record in caplog.records):
            assert not pending.done(), pending.result()
            threading.Event().wait(0.01)
        kept = len(fake.answered)
        fake.start()
        same(pending.result(timeout=60), local(path, batch, TOP))
    if concurrency == 1:  # else an answer may have been under way when the connections broke
        assert kept == 5
        scored = {ids: count for ids, count in Counter(fake.answered).items() if ids in rows(batch)}
        assert scored == rows(batch), "an answered rollout was asked for again"
    (note,) = (record.message for record in caplog.records if "waiting" in record.message)
    assert note.startswith(f"model.teacher: no server answers ({fake.url}: ")
    assert note.endswith("); waiting up to 30 s for one to return")
    assert caplog.records[-1].message == f"model.teacher: {fake.url} answers again"


def test_one_of_two_dies_the_other_goes_on_until_it_is_back(path: str) -> None:
    batch = rollout_batch()
    first, second = FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))
    with ready(path, first, second, concurrency=2) as part:
        first.plan = [die]
        same(part.score(batch, SAMPLED), local(path, batch, SAMPLED))
        assert rows(batch) <= Counter(first.answered + second.answered)
        first.start()
        first.forget()
        for _ in range(200):
            part.score(batch, SAMPLED)
            if Counter(first.answered) & rows(batch):
                break
            threading.Event().wait(0.01)
        assert Counter(first.answered) & rows(batch), "the server that returned is not used"


def test_a_server_whose_health_is_bad_is_not_asked(path: str) -> None:
    batch = rollout_batch()
    ill, well = FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))
    with ready(path, ill, well) as part:
        ill.health, ill.always = 503, status(500)
        for _ in range(3):
            same(part.score(batch, SAMPLED), local(path, batch, SAMPLED))
        checks, asked = ill.health_checks, len(ill.asked)
        assert asked <= 4, "more than the requests that were under way when the first failed"
        ill.health, ill.always = 200, None
        while ill.health_checks == checks or len(ill.asked) == asked:
            part.score(batch, SAMPLED)


def test_when_none_returns_the_run_ends(path: str, caplog: pytest.LogCaptureFixture) -> None:
    fakes = [FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))]
    with ready(path, *fakes, max_wait_s=0.3) as part:
        for fake in fakes:
            fake.kill()
        with pytest.raises(ScoringError) as caught, caplog.at_level(logging.WARNING):
            part.score(rollout_batch(), SAMPLED)
    lines = str(caught.value).splitlines()
    assert lines[0] == "model.teacher.urls: no server answers, and none came back within 0.3 s"
    assert all(fake.url in lines[1] for fake in fakes)
    assert "--ckpt_path last" in lines[2] and "model.teacher.max_wait_s" in lines[2]
    assert len([r for r in caplog.records if "waiting up to 0.3 s" in r.message]) == 1


def test_the_end_of_a_run_ends_the_waiting(path: str, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeVLLM(tiny_model(5))
    with ready(path, fake, max_wait_s=3600.0) as part, ThreadPoolExecutor(1) as threads:
        fake.kill()
        pending = threads.submit(part.score, rollout_batch(), SAMPLED)
        while not any("no server answers" in record.message for record in caplog.records):
            threading.Event().wait(0.01)
        part.teardown()
        with pytest.raises(ScoringError, match="scoring was ended"):
            pending.result(timeout=60)


def test_another_model_at_the_same_address_is_found_out(path: str) -> None:
    batch, fake = rollout_batch(), FakeVLLM(tiny_model(5))
    with ready(path, fake) as part:
        fake.plan = [die]
        fake.start_when_dead(model=tiny_model(6))
        with pytest.raises(ScoringError, match=r"came back as another server\n.*nats/token apart"):
            part.score(batch, SAMPLED)


def test_another_name_at_the_same_address_is_found_out(path: str) -> None:
    batch, fake = rollout_batch(), FakeVLLM(tiny_model(5))
    with ready(path, fake, model="teacher", concurrency=1) as part:  # a second request could reach the new server first
        fake.plan = [die]
        fake.start_when_dead(name="student")
        with pytest.raises(ScoringError, match=r"came back as another server\nmodel.teacher.model: .* another model"):
            part.score(batch, SAMPLED)


def drop(choice: dict[str, Any]) -> None:
    del choice["prompt_logprobs"][-1], choice["prompt_token_ids"][-1]


def shift(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [None, None, *choice["prompt_logprobs"][1:-1]]


def other_ids(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"][1] += 1


def fewer(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [r and dict(list(r.items())[:2]) for r in choice["prompt_logprobs"]]


def no_numbers(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [r and {k: {"logprob": "?"} for k in r} for r in choice["prompt_logprobs"]]


def positive(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [r and {k: {"logprob": 1.5} for k in r} for r in choice["prompt_logprobs"]]


def nothing(choice: dict[str, Any]) -> None:
    choice.clear()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop, r"scores of 4 tokens \[.*\], for the 5 tokens"),
        (other_ids, r"scores of 5 tokens \[.*\], for the 5 tokens"),
        (shift, r"no log-prob of token \d+ at position 4, but of|no log-probs at position"),
        (fewer, r"2 log-probs at position 4, fewer than the 5 asked for"),
        (no_numbers, r"no log-probs at position 4"),
        (positive, r"values at position 4 that are no log-probs"),
        (nothing, r"an answer without choices\[0\].prompt_logprobs"),
    ],
)
def test_answers_about_other_tokens_are_refused_at_once(
    path: str, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    fake = FakeVLLM(tiny_model(5))
    with ready(path, fake) as part:
        fake.always = changed(change)
        with pytest.raises(ScoringError, match=rf"model.teacher.urls\[0\]: {fake.url} does not score\n.*{text}"):
            part.score(rollout_batch({"1+1=": ["2"]}, max_new_tokens=1), TOP)
    assert len(fake.asked) == 1


def test_a_request_that_the_server_refuses_ends_the_call(path: str) -> None:
    fake, raised = FakeVLLM(tiny_model(5)), threading.Event()
    with ready(path, fake, concurrency=1) as part:
        fake.plan, fake.always = [status(400, "no prompt log-probs here")], waits(raised)
        with pytest.raises(ScoringError, match=r"HTTP 400 no prompt log-probs here"):
            part.score(rollout_batch(), SAMPLED)
        raised.set()
    assert len(fake.asked) <= 2, "neither is it repeated, nor are the other rollouts asked for"


def test_a_token_that_the_teacher_rules_out_is_not_valid(path: str) -> None:
    batch, fake = rollout_batch({"1+1=": ["2", "3"]}), FakeVLLM(tiny_model(5))
    at = int(batch.prompt_lengths[0])
    token = int(batch.tokens[0, at])

    def impossible(choice: dict[str, Any]) -> None:
        row = choice["prompt_logprobs"][at]
        if str(token) in row:
            row[str(token)]["logprob"] = -9999.0

    with ready(path, fake) as part:
        fake.always = changed(impossible)
        scores = part.score(batch, SAMPLED)
    assert scores.sampled is not None and scores.sampled.isfinite().all()
    assert not scores.valid[0, at] and scores.valid[1, at] and scores.valid[0, at + 1]


def test_ids_that_the_student_does_not_have_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = padded(3)
    path, fake = save(model, tmp_path), FakeVLLM(model)
    batch, limit = rollout_batch({"1+1=": ["2", "33", "#"]}), student_info().vocab_limit
    with torch.no_grad():
        share = model(input_ids=batch.tokens).logits.softmax(-1)[..., limit:].sum(-1).max()
    assert 1e-3 < share < 0.5
    monkeypatch.setattr("distillkit.teachers.vllm_checks._PADDING_MASS", 0.5)
    fake.max_logprobs = limit + 3
    for k in (1, 20, 50, 60, limit):
        with ready(path, fake, max_logprobs=limit + 3 if k == limit else 64) as part:
            request = ScoreRequest(sampled=True, topk=k)
            found, theirs = part.score(batch, request), local(path, batch, request)
            assert torch.equal(found.topk_ids, theirs.topk_ids)
            # Padding that was returned is out of the softmax; what was not returned is still in it.
            bound = 1e-5 if k == limit else float(-(1 - share).log()) + 1e-5
            torch.testing.assert_close(found.topk, theirs.topk, rtol=0, atol=bound)
            torch.testing.assert_close(found.sampled, theirs.sampled, rtol=0, atol=bound)
            if k == limit:
                assert len(fake.asked) == 2 * len(batch), "the ids to leave out were not among the most likely ones"
    with (
        ready(path, fake, max_logprobs=64) as part,
        pytest.raises(ConfigError, match=r"max_logprobs: 67, and vllm serve MODEL --max-logprobs 67"),
    ):
        part.score(batch, ScoreRequest(sampled=True, topk=64))


def test_a_rollout_that_is_too_long_names_its_group(path: str) -> None:
    fake = FakeVLLM(tiny_model(5))
    fake.max_model_len = 10
    with ready(path, fake) as part:
        part.score(rollout_batch({"1+1=": ["22222"]}, max_new_tokens=5), SAMPLED)
        with pytest.raises(ScoringError) as caught:
            part.score(rollout_batch({"2+2=": ["2"], "1+1=": ["222222"]}), SAMPLED)
    assert str(caught.value) == (
        f"model.teacher.urls[0]: a rollout of group 6 is too long for {fake.url}\n"
        "    got:      4 prompt tokens + 6 of the completion + 1 = 11\n"
        "    expected: at most 10\n"
        "    try:      vllm serve MODEL --max-model-len N, a smaller model.sampler.max_new_tokens, or shorter prompts"
    )


def test_other_temperatures_are_refused(path: str) -> None:
    with (
        ready(path, FakeVLLM(tiny_model(5))) as part,
        pytest.raises(ConfigError, match=r"model.distil_temperature: a vLLM server scores at temperature 1 only"),
    ):
        part.score(rollout_batch(), ScoreRequest(sampled=True, temperature=0.7))


def test_scores_on_disk_are_not_asked_for_again(path: str, tmp_path: Path) -> None:
    batch, fake = rollout_batch(), FakeVLLM(tiny_model(5))
    with running(fake) as fakes:
        for _ in range(2):
            part = CachedTeacher(teacher=teacher(fakes, path), dir=str(tmp_path / "cache"))
            part.setup(student_info())
            fake.forget()
            same(part.score(batch, TOP), local(path, batch, TOP))
            part.teardown()
            assert not part.any_temperature
    assert fake.asked == []


def test_end_tokens_that_differ_are_left_out_when_tolerated(path: str) -> None:
    info = student_info()
    info.tokenizer.eos_token = "#"
    info = replace(info, eos_token_ids=(int(info.tokenizer.eos_token_id),))
    batch = rollout_batch()
    with running(FakeVLLM(tiny_model(5))) as fakes, pytest.raises(ModelError, match=r"tolerate: \[eos\]"):
        teacher(fakes, path).setup(info)
    with ready(path, FakeVLLM(tiny_model(5)), info=info, tolerate=("eos",)) as part:
        scores = part.score(batch, SAMPLED)
    ends = (batch.tokens == 1) | (batch.tokens == info.eos_token_ids[0])
    assert torch.equal(scores.valid, batch.loss_mask & ~ends)


def test_the_identity_is_that_of_name_and_files(path: str, tmp_path: Path) -> None:
    urls = ("http://localhost:1",)
    one = VLLMTeacher(urls=urls, path=path, model="a").identity()
    assert one == VLLMTeacher(urls=("http://localhost:2", *urls), path=path, model="a", timeout_s=1.0).identity()
    assert one != VLLMTeacher(urls=urls, path=path, model="b").identity()
    assert one != VLLMTeacher(urls=urls, path=save(tiny_model(6), tmp_path), model="a").identity()
