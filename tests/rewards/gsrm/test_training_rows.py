"""Rows that a decomposer is trained on are what it is asked at inference, and SupervisedModule's data reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillkit.data import DataSource
from distillkit.data.prompts import prepare_prompts
from distillkit.data.sources import read_source
from distillkit.decomposition import Decomposition, DecompositionError, ReasoningStep, messages, parse, render
from distillkit.rewards.gsrm.chat_model import ChatModel
from distillkit.rewards.gsrm.training_rows import item_id, problem_text, thoughts, training_rows
from distillkit.testing import char_tokenizer
from tests.rewards.gsrm import markov

STEP = ReasoningStep(meta="the product first", question="4*2", answer="8")
GIVEN = Decomposition(steps=(STEP, STEP), final="8")


def test_a_row_asks_what_inference_asks_and_its_target_parses_back() -> None:
    [row] = training_rows([("3+4*2>", "3+8>1", GIVEN)])
    assert row["prompt"] == messages("3+4*2>", "3+8>1")
    assert parse(row["completion"]) == GIVEN
    assert row["id"] == item_id("3+4*2>", "3+8>1") != item_id("3+4*2>3+8>1", "")


def test_the_data_module_tokenises_a_row_as_the_decomposer_is_prompted(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in training_rows([("1+1", "2", GIVEN), ("p", "t", GIVEN)])))
    source = DataSource(path=str(file))
    words = char_tokenizer()
    prompts = prepare_prompts(read_source(source), source, words, completions=True)
    path = markov.save(tmp_path / "model", {})
    model = ChatModel(path=path, dtype="auto", device=torch.device("cpu"), where="x", chat_template_kwargs={})
    assert list(prompts[0].prompt_ids) == model.prompt(messages("1+1", "2"))
    assert words.decode(prompts[0].completion_ids or [], skip_special_tokens=True) == render(GIVEN)
    assert (prompts[0].completion_ids or [])[-1] == words.eos_token_id


def test_what_has_no_steps_is_no_row() -> None:
    with pytest.raises(DecompositionError) as caught:
        training_rows([("p", "t", Decomposition(steps=()))])
    assert str(caught.value) == "decomposition: no steps\n    got:      0 steps\n    expected: at least 1"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("1+1?", "1+1?"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "a\n\nc",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "a\nb"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": None}], ""),
    ],
)
def test_the_problem_in_a_prompt(prompt: object, text: str) -> None:
    assert problem_text(prompt) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "end", "thought"),
    [
        ("one</think>two", "</think>", "one"),
        ("<think>\none\n</think>two</think>", "</think>", "one"),
        ("no tag", "</think>", "no tag"),
        ("</think>2", "</think>", ""),
        ("<think></think>2", "</think>", ""),
        ("<think>a</think>b", None, "<think>a</think>b"),
        ("thoughts END answer", "END", "thoughts"),
        ("   ", "</think>", ""),
    ],
)
def test_only_thoughts_are_reasoning(text: str, end: str | None, thought: str) -> None:
    assert thoughts(text, end) == thought
