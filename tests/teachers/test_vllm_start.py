"""What the `vllm` teacher asks of its servers before it trusts them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distillkit.betas.constant import Constant
from distillkit.betas.linear import Linear
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.sampled import K2
from distillkit.divergences.topk import TopK
from distillkit.errors import ConfigError, DistillkitError, ModelError, ScoringError
from distillkit.refusals import StepParts, check_parts, check_supervised
from distillkit.samplers.hf import HFSampler
from distillkit.teachers.extrapolated import ExtrapolatedTeacher
from distillkit.teachers.vllm import VLLMTeacher
from distillkit.teachers.vllm_request import server_address
from distillkit.testing import FakeTeacher, char_tokenizer, student_info, tiny_model
from tests.teachers.fake_vllm import FakeVLLM, running, status
from tests.teachers.test_vllm import padded, path, save, teacher

__all__ = ["path"]


def refused(kind: type[DistillkitError], fakes: list[FakeVLLM], path: str, **settings: Any) -> str:
    """The text of the error that the start-up check ends with."""
    with running(*fakes) as started, pytest.raises(kind) as caught:
        teacher(started, path, **settings).setup(student_info())
    assert type(caught.value) is kind
    return str(caught.value)


def test_nobody_listens(path: str) -> None:
    with running(FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(5))) as fakes:
        part = teacher(fakes, path)
        fakes[1].kill()
        with pytest.raises(ConfigError) as caught:
            part.setup(student_info())
    lines = str(caught.value).splitlines()
    assert lines[0] == "model.teacher.urls[1]: no server"
    assert fakes[1].url in lines[1] and "cannot connect" in lines[1]
    assert lines[3] == "    try:      vllm serve MODEL --port PORT, or another address"


def test_another_model(path: str) -> None:
    text = refused(ConfigError, [FakeVLLM(tiny_model(5), name="qwen")], path, model="teacher")
    assert "model.teacher.model: http://127.0.0.1:" in text and "serves another model" in text
    assert "'teacher'\n    expected: an-adapter, qwen\n" in text


def test_the_served_model_is_taken_where_none_is_named(path: str) -> None:
    with running(FakeVLLM(tiny_model(5), name="qwen")) as fakes:
        part = teacher(fakes, path)
        part.setup(student_info())
        part.teardown()
    assert fakes[0].answered and part.model is None


def test_another_tokenizer(path: str) -> None:
    """As long as the student's, with the same ids for other tokens."""
    server = FakeVLLM(tiny_model(5))
    server.tokenizer = char_tokenizer()
    with running(server) as fakes:
        teacher(fakes, path).setup(student_info())
    turned = json.loads(server.tokenizer.backend_tokenizer.to_str())
    size = len(turned["model"]["vocab"])
    turned["model"]["vocab"] = {token: (i + 3) % size for token, i in turned["model"]["vocab"].items()}
    server.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(turned)))
    text = refused(ModelError, [server], path)
    assert "model.teacher.urls[0]: the model behind it has another tokenizer than model.teacher.path\n" in text
    assert server.url in text and "try:      serve the model of model.teacher.path" in text


def test_a_server_of_another_kind(path: str) -> None:
    fake = FakeVLLM(tiny_model(5))
    fake.models = lambda: [1]  # type: ignore[assignment, return-value, list-item]
    assert "urls[0]: not a server of the OpenAI kind" in refused(ConfigError, [fake], path)


def test_a_smaller_vocabulary(tmp_path: Path) -> None:
    path = save(padded(3), tmp_path)
    info = student_info()
    with running(FakeVLLM(tiny_model(5))) as fakes, pytest.raises(ModelError) as caught:
        VLLMTeacher(urls=(fakes[0].url,), path=path).setup(
            type(info)(**{**vars(info), "vocab_limit": info.vocab_limit + 3})
        )
    assert "urls[0]: the model behind it has another vocabulary than model.teacher.path" in str(caught.value)
    assert "Token id 101 is out of vocabulary\n    expected: token ids up to 101" in str(caught.value)


def test_ids_of_its_own_that_the_teacher_uses(tmp_path: Path) -> None:
    path = save(padded(3), tmp_path)
    text = refused(ModelError, [FakeVLLM(padded(3))], path)
    assert (
        "the teacher uses some of its 3 token ids that the student does not have\n    got:      probability 0." in text
    )
    assert "try:      model.teacher: {name: local, path: ...} leaves them out" in text


def test_too_few_log_probs(path: str) -> None:
    text = refused(ConfigError, [FakeVLLM(tiny_model(5), max_logprobs=20)], path, max_logprobs=50)
    assert text.startswith("model.teacher.max_logprobs: the server gives fewer than 50 log-probs per token\n")
    assert "try:      vllm serve MODEL --max-logprobs 50, or a smaller model.teacher.max_logprobs" in text


def test_a_teacher_with_fewer_tokens_than_max_logprobs_is_asked_for_all_of_them(path: str) -> None:
    with running(FakeVLLM(tiny_model(5), max_logprobs=200)) as fakes:
        part = teacher(fakes, path, max_logprobs=200)
        part.setup(student_info())
        part.teardown()


def test_servers_that_differ(path: str) -> None:
    fakes = [FakeVLLM(tiny_model(5)), FakeVLLM(tiny_model(6))]
    text = refused(ScoringError, fakes, path)
    assert f"model.teacher.urls[1]: {fakes[1].url} and {fakes[0].url} serve different models" in text
    assert "nats/token apart\n    expected: at most 0.2" in text


def test_a_server_that_answers_differently_each_time(path: str) -> None:
    fake, models = FakeVLLM(tiny_model(5)), itertools.cycle([tiny_model(6), tiny_model(5)])

    def another(fake: FakeVLLM, handler: Any, entries: dict[str, Any]) -> bool:
        fake.model = next(models)
        return False

    fake.always = another
    assert "scores the same tokens differently each time" in refused(ScoringError, [fake], path)


def test_a_server_that_does_not_score(path: str) -> None:
    fake = FakeVLLM(tiny_model(5))
    fake.always = status(500, "engine dead")
    text = refused(ScoringError, [fake], path)
    assert "urls[0]" in text and "does not score token ids\n    got:      HTTP 500 engine dead" in text


def test_the_key_is_sent_and_never_shown(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeVLLM(tiny_model(5))) as fakes:
        part = teacher(fakes, path, api_key_env="TEACHER_KEY")
        for wrong in ("", "two words", "ümlaut"):
            monkeypatch.setenv("TEACHER_KEY", wrong)
            with pytest.raises(ConfigError, match=r"api_key_env: no key in the environment variable TEACHER_KEY") as e:
                part.setup(student_info())
            assert not wrong or wrong not in str(e.value)
        monkeypatch.setenv("TEACHER_KEY", "secret")
        part.setup(student_info())
        part.teardown()
    assert set(fakes[0].keys) == {"Bearer secret"} and "secret" not in part.identity()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"urls": ()}, r"model.teacher.urls\n.*\(\)"),
        ({"urls": "http://localhost:8000"}, r"model.teacher.urls\n"),
        ({"urls": ("http://localhost:8000", "localhost:8001")}, r"urls\[1\]: no address\n.*localhost:8001"),
        ({"urls": ("http://me:secret@localhost:8000",)}, r"urls\[0\]: credentials in the address\n    expected: none"),
        ({"max_logprobs": -1}, r"model.teacher.max_logprobs"),
        ({"concurrency": 0}, r"model.teacher.concurrency"),
        ({"timeout_s": 0}, r"model.teacher.timeout_s"),
        ({"retries": -1}, r"model.teacher.retries"),
        ({"backoff_s": -1.0}, r"model.teacher.backoff_s"),
        ({"max_wait_s": -1.0}, r"model.teacher.max_wait_s"),
    ],
)
def test_arguments_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        VLLMTeacher(**{"urls": ("http://localhost:8000",), "path": "x", **settings})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_addresses(address: str) -> None:
    assert server_address(address, "x") == "http://h:1"


def test_before_any_model_is_loaded(path: str) -> None:
    part = VLLMTeacher(urls=("http://localhost:8000",), path=path, max_logprobs=20)
    parts = StepParts(sampler=HFSampler(), teacher=part, divergence=K2(), beta=Constant(value=1.0))
    check_parts(parts, "loss")
    with pytest.raises(ConfigError, match=r"model.distil_temperature: VLLMTeacher scores at temperature 1 only\n.*2.0"):
        check_parts(parts, "loss", 2.0)
    scheduled = {**vars(parts), "schedules": {"distil_temperature": Linear(start=2.0, end=1.0, steps=5)}}
    with pytest.raises(ConfigError, match=r"model.schedules.distil_temperature: VLLMTeacher scores at temperature 1"):
        check_parts(StepParts(**scheduled), "loss")
    both = ExtrapolatedTeacher(teacher=FakeTeacher(), base=part)
    with pytest.raises(ConfigError, match=r"ExtrapolatedTeacher scores at temperature 1 only"):
        check_parts(StepParts(**{**vars(parts), "teacher": both}), "loss", 0.5)
    check_parts(StepParts(**{**vars(parts), "teacher": FakeTeacher()}), "loss", 0.5)
    wide = StepParts(**{**vars(parts), "divergence": TopK(k=64)})
    with pytest.raises(
        ConfigError, match=r"its top 64 log-probs \(it gives 20\)\n    try:      .*max_logprobs: 64, and vllm"
    ):
        check_parts(wide, "loss")
    exact = StepParts(**{**vars(parts), "divergence": ReverseKL()})
    with pytest.raises(ConfigError, match=r"whole distributions\n    try:      .* local, path: ...} gives everything"):
        check_parts(exact, "loss")
    few = TopK(k=8, direction="forward")
    check_supervised(teacher=part, divergence=few, beta=Constant(value=1.0), sft_weight=0.0)
    with pytest.raises(ConfigError, match=r"model.distil_temperature: VLLMTeacher scores at temperature 1 only"):
        check_supervised(teacher=part, divergence=few, beta=Constant(value=1.0), sft_weight=0.0, distil_temperature=2.0)
