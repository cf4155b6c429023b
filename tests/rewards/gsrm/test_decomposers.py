"""Decomposers: a real model with known replies, a real server, and everything that is not a decomposition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.decomposition import Decomposition, ReasoningStep, messages, render
from distillkit.errors import ConfigError, DataError, ModelError, ScoringError
from distillkit.rewards.gsrm.decomposer import Undecided, read_reply
from distillkit.rewards.gsrm.local import LocalDecomposer
from distillkit.rewards.gsrm.server import ServerDecomposer
from distillkit.testing import char_tokenizer, tiny_model
from tests.rewards.gsrm import markov
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says

CPU = torch.device("cpu")


def steps(*answers: str) -> Decomposition:
    made = tuple(ReasoningStep(meta=f"m{i}", question=f"q{i}", answer=a) for i, a in enumerate(answers))
    return Decomposition(steps=made, final=answers[-1])


ONE, TWO = steps("1"), steps("1", "2")


def local(tmp_path: Path, **options: Any) -> LocalDecomposer:
    """Traces ending in a, b are decomposed; ? gives chatter; + never ends; # is cut off inside its final answer."""
    model = options.pop("model", {})
    table = {
        "a": {render(ONE): 1.0},
        "b": {render(TWO): 1.0},
        "?": {"Sure!": 1.0},
        "+": {"*": 1.0},
        "*": {"+": 1.0},
        "#": {"Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: 1\nFinal answer: ": 1.0},
        "Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: 1\nFinal answer: ": {"7": 1.0},
        "7": {"7": 1.0},
    }
    phrases = [word for row in table.values() for word in row if len(word) > 1]
    path = markov.save(tmp_path / "decomposer", table, phrases=phrases, **model)
    decomposer = LocalDecomposer(path=path, **{"max_new_tokens": 8, **options})
    decomposer.setup(CPU)
    return decomposer


def test_a_local_model_takes_traces_apart_all_at_once(tmp_path: Path) -> None:
    decomposer = local(tmp_path)
    items = [("p", "xa"), ("a longer problem", "y" * 50 + "b"), ("p", "?"), ("p", "+"), ("p", "#"), ("", "b")]
    expected = [
        ONE,
        TWO,
        Undecided(reason="not a decomposition", detail="text outside a block"),
        Undecided(reason="a decomposition longer than max_new_tokens", detail="8"),
        Undecided(reason="a decomposition longer than max_new_tokens", detail="8"),
        TWO,
    ]
    assert decomposer.decompose(items) == expected
    assert decomposer.decompose(items[::-1]) == expected[::-1]
    assert [decomposer.decompose([item])[0] for item in items] == expected
    assert decomposer.decompose([]) == []
    assert local(tmp_path, tokens_per_batch=1).decompose(items) == expected


def test_all_traces_are_one_batch_as_far_as_the_budget_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(decomposer: LocalDecomposer) -> list[int]:
        sizes.clear()
        model = decomposer._model
        assert model is not None
        generate: Any = model.model.generate

        def counting(**arguments: Any) -> Any:
            sizes.append(len(arguments["input_ids"]))
            return generate(**arguments)

        monkeypatch.setattr(model.model, "generate", counting)
        decomposer.decompose([("p", "x" * n + "a") for n in range(0, 120, 5)])
        return sizes

    assert counted(local(tmp_path)) == [24]
    longest = len(markov.tokenizer()("".join(m["content"] for m in messages("p", "x" * 115 + "a")))["input_ids"]) + 8
    assert counted(local(tmp_path, tokens_per_batch=12 * longest)) == [12, 12]


def test_a_checkpoints_own_sampling_settings_do_not_count(tmp_path: Path) -> None:
    decomposer = local(tmp_path)
    file = tmp_path / "decomposer" / "generation_config.json"
    own = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_new_tokens": 1, "eos_token_id": 1}
    file.write_text(json.dumps(own))
    decomposer.setup(CPU)
    assert decomposer.decompose([("p", "xa")] * 20) == [ONE] * 20


def test_the_generation_configs_end_tokens_end_a_reply(tmp_path: Path) -> None:
    decomposer = local(tmp_path)
    end = markov.tokenizer([render(ONE)]).convert_tokens_to_ids("7")
    (tmp_path / "decomposer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    decomposer.setup(CPU)
    [result] = decomposer.decompose([("p", "#")])
    assert isinstance(result, Decomposition) and result.final == ""


def test_a_trace_longer_than_the_context_is_not_decomposed(tmp_path: Path) -> None:
    def tokens(trace: str) -> int:
        return len(markov.tokenizer()("".join(m["content"] for m in messages("p", trace)))["input_ids"])

    room = tokens("xxxa") + 8
    for model in ({"context": room}, {"limit": room}, {"context": room, "limit": room + 50}):
        decomposer = local(tmp_path, model=model)
        results = decomposer.decompose([("p", "xxxa"), ("p", "xxxxa"), ("p", "a")])
        detail = f"{tokens('xxxxa')} tokens, 8 new ones, {room} in all"
        too_long = Undecided(reason="longer than the decomposer's context", detail=detail)
        assert results == [ONE, too_long, ONE]


def test_new_tokens_that_fill_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        local(tmp_path, max_new_tokens=512, model={"context": 512})
    assert str(caught.value) == (
        "model.rewards: gsrm.decomposer.max_new_tokens: no room for a trace in the context of "
        f"{tmp_path / 'decomposer'}\n    got:      512\n    expected: well below 512 tokens"
    )


def test_new_tokens_are_by_default_what_the_context_has_room_for(tmp_path: Path) -> None:
    for context, room in ((1600, 800), (4096, 1024)):
        decomposer = local(tmp_path, max_new_tokens=None, model={"context": context})
        [endless] = decomposer.decompose([("p", "+")])
        assert endless == Undecided(reason="a decomposition longer than max_new_tokens", detail=str(room))


def test_the_embedded_decomposer_needs_no_length() -> None:
    decomposer = LocalDecomposer(path="embedded:decomposer")
    decomposer.setup(CPU)
    [result] = decomposer.decompose([("3*2+4*5>", "3*2+0>6+0>6")])
    assert isinstance(result, Decomposition) and len(result.steps) == 3


def test_identity_follows_weights_settings_and_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = local(tmp_path)
    known = {first.identity()}
    assert local(tmp_path).identity() in known
    known.add(local(tmp_path, max_new_tokens=9).identity())
    known.add(LocalDecomposer(path=first.path, max_new_tokens=8, chat_template_kwargs={"a": 1}).identity())
    known.add(LocalDecomposer(path=first.path, max_new_tokens=8, dtype="float32").identity())
    monkeypatch.setattr("distillkit.rewards.gsrm.decomposer.instructions", lambda: "another grammar")
    known.add(first.identity())
    monkeypatch.undo()
    markov.save(tmp_path / "decomposer", {"a": {"b": 1.0}})
    known.add(first.identity())
    assert len(known) == 6


def test_a_random_model_decomposes_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    tiny_model(3).save_pretrained(tmp_path)
    words = char_tokenizer()
    # The prompts of the grammar are longer than the tiny model's positions; only the trace is kept.
    words.chat_template = "{{ messages[-1]['content'] }}"
    words.save_pretrained(tmp_path)
    decomposer = LocalDecomposer(path=str(tmp_path), max_new_tokens=32)
    decomposer.setup(CPU)
    results = decomposer.decompose([("1+1=", "2"), ("2+2=", "4" * 90)])
    assert all(isinstance(result, Undecided) and result.lasting for result in results)


def test_a_local_decomposer_before_setup_and_without_a_model(tmp_path: Path) -> None:
    decomposer = LocalDecomposer(path=str(tmp_path / "nothing"))
    with pytest.raises(ScoringError) as caught:
        decomposer.decompose([("p", "t")])
    assert str(caught.value) == (
        "LocalDecomposer.decompose\n    got:      called before setup\n    try:      call setup first"
    )
    with pytest.raises(ModelError) as missing:
        decomposer.setup(CPU)
    assert str(missing.value).startswith("model.rewards: gsrm.decomposer.path: cannot load a tokenizer\n")
    for argument in ("max_new_tokens", "tokens_per_batch"):
        with pytest.raises(ConfigError) as refused:
            LocalDecomposer(path="p", **{argument: 0})
        assert str(refused.value) == (
            f"model.rewards: gsrm.decomposer.{argument}\n    got:      0\n    expected: at least 1 token"
        )


def test_the_embedded_decomposer_loads_by_name() -> None:
    decomposer = LocalDecomposer(path="embedded:decomposer", max_new_tokens=96)
    decomposer.setup(CPU)
    [result] = decomposer.decompose([("3*2+4*5>", "3*2+0>6+0>6")])
    assert isinstance(result, Decomposition)
    assert [(step.question, step.answer) for step in result.steps] == [("4*5", "0"), ("3*2", "6"), ("6+0", "6")]
    decomposer.teardown()


def test_a_thinking_models_thoughts_are_not_its_reply() -> None:
    reply = f"<think>Step 1 is … hm</think>\n\n{render(ONE)}"
    assert read_reply(reply, finished=True, limit=9) == ONE
    endless = read_reply("<think>Step 1", finished=True, limit=9)
    assert endless == Undecided(reason="not a decomposition", detail="labels missing, repeated or out of order")


def server(url: str, **options: Any) -> ServerDecomposer:
    decomposer = ServerDecomposer(**{"base_url": url, "model": "m", "retries": 1, "backoff_s": 0.0, **options})
    decomposer.setup(CPU)
    return decomposer


def test_a_server_takes_traces_apart() -> None:
    replies = {"one": says(render(ONE)), "two": says(render(TWO)), "chat": says("Sure! " + render(ONE)),
               "cut": says(render(ONE), finish_reason="length"), "odd": Answer({"choices": 3})}  # fmt: skip

    def answers(body: Any, number: int) -> Answer:
        return replies[body["messages"][-1]["content"].rsplit("\n", 1)[1]]

    with chat_server(answers) as running:
        decomposer = server(running.url, max_new_tokens=77)
        results = decomposer.decompose([("p", name) for name in replies])
        decomposer.teardown()
    assert results == [
        ONE,
        TWO,
        Undecided(reason="not a decomposition", detail="text outside a block"),
        Undecided(reason="a decomposition longer than max_new_tokens", detail="77"),
        Undecided(reason="an answer without choices[0].message.content", detail='{"choices": 3}', lasting=False),
    ]
    by_trace = {asked.body["messages"][-1]["content"]: asked.body for asked in running.asked}
    body = by_trace[messages("p", "one")[1]["content"]]
    assert body == {"model": "m", "messages": messages("p", "one"), "temperature": 0.0, "max_tokens": 77}


def test_a_server_that_is_down_decides_nothing() -> None:
    decomposer = server(nobody(), concurrency=1)
    results = decomposer.decompose([("p", "a"), ("p", "b")])
    decomposer.teardown()
    assert [isinstance(r, Undecided) and not r.lasting for r in results] == [True, True]


def written(file: Path, rows: Sequence[Any]) -> str:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(file)


def test_examples_are_shown_as_turns_in_the_grammar(tmp_path: Path) -> None:
    text = render(ONE).replace("Step 1", "\nStep 1\n") + "\n"  # as a person might write it
    rows = [{"problem": "1?", "trace": "one", "decomposition": text}, "", {
        "problem": "2?", "trace": "two", "decomposition": render(TWO)}]  # fmt: skip
    file = written(tmp_path / "examples.jsonl", rows)
    with chat_server([says(render(ONE))]) as running:
        decomposer = server(running.url, examples=file)
        assert decomposer.decompose([("p", "t")]) == [ONE]
        decomposer.teardown()
    assert running.asked[0].body["messages"] == [
        messages("p", "t")[0],
        messages("1?", "one")[1],
        {"role": "assistant", "content": render(ONE)},
        messages("2?", "two")[1],
        {"role": "assistant", "content": render(TWO)},
        messages("p", "t")[1],
    ]


ROW = '{"problem": text, "trace": text, "decomposition": text in the grammar}'


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "{where}: no examples\n    got:      {file}\n    expected: {row}"),
        (
            [{"problem": "1?", "trace": "", "decomposition": "x"}],
            "{where}: {file}, line 1: not an example\n"
            '    got:      {{"problem": "1?", "trace": "", "decomposition": "x"}}\n    expected: {row}',
        ),
        (
            ["", "{oops"],
            "{where}: {file}, line 2: not JSON\n"
            "    got:      Expecting property name enclosed in double quotes: line 1 column 2 (char 1)\n"
            "    expected: {row}",
        ),
        (
            [{"problem": "1?", "trace": "t", "decomposition": "Step 1"}],
            "{where}: {file}, line 1: decomposition: labels missing, repeated or out of order\n"
            "    got:      '1 steps, 1 labels'\n"
            "    expected: Step 1 / Meta-reasoning: … / Sub-problem: … / Answer: … / … / Final answer: …",
        ),
    ],
)
def test_examples_that_cannot_be_used_are_named(tmp_path: Path, rows: list[Any], text: str) -> None:
    file = written(tmp_path / "examples.jsonl", rows)
    decomposer = ServerDecomposer(base_url="http://localhost", model="m", examples=file)
    with pytest.raises(DataError) as caught:
        decomposer.setup(CPU)
    assert str(caught.value) == text.format(where="model.rewards: gsrm.decomposer.examples", file=file, row=ROW)


def test_a_missing_examples_file(tmp_path: Path) -> None:
    decomposer = ServerDecomposer(base_url="http://localhost", model="m", examples=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError) as caught:
        decomposer.setup(CPU)
    assert str(caught.value).startswith("model.rewards: gsrm.decomposer.examples: cannot be read\n    got:      ")


def test_a_servers_identity_is_its_model_not_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(**options: Any) -> str:
        decomposer = ServerDecomposer(**{"base_url": "http://a", "model": "m", **options})
        decomposer.setup(CPU)
        decomposer.teardown()
        return decomposer.identity()

    monkeypatch.setenv("SOME_KEY", "sk-secret")
    assert identity() == identity(base_url="http://b:99/v1", api_key_env="SOME_KEY", concurrency=2)
    assert "sk-secret" not in identity(api_key_env="SOME_KEY")
    examples = written(tmp_path / "e.jsonl", [{"problem": "1?", "trace": "t", "decomposition": render(ONE)}])
    others = [{"model": "n"}, {"max_new_tokens": 5}, {"extra_body": {"seed": 1}}, {"examples": examples}]
    assert len({identity(), *(identity(**other) for other in others)}) == 5


def test_a_servers_arguments_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerDecomposer(base_url="http://localhost", model="m", max_new_tokens=0)
    assert str(caught.value) == (
        "model.rewards: gsrm.decomposer.max_new_tokens\n    got:      0\n    expected: at least 1 token"
    )
