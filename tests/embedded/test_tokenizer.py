"""The character tokenizer, as built and as saved beside both models."""

from __future__ import annotations

import random
import string

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distillkit.embedded import MODELS
from distillkit.embedded.tokenizer import build_tokenizer

ALPHABET = string.printable[:95] + "\n"


@pytest.fixture(scope="module", params=["built", "embedded:teacher", "embedded:student"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return build_tokenizer() if request.param == "built" else AutoTokenizer.from_pretrained(MODELS[request.param])


def test_printable_text_comes_back_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for text in ["".join(rng.choices(ALPHABET + "  ,.'n", k=40)) for _ in range(100)]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 40
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_distinct_and_never_added(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("3+4>7<eos>")["input_ids"] == [*tokenizer("3+4>7")["input_ids"], 1]
    assert tokenizer("é")["input_ids"] == [2]
    assert tokenizer.decode([1, 0, 0], skip_special_tokens=True) == ""


def test_messages_become_the_plain_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    for content in ("3+4", "3+4>"):
        question = {"role": "user", "content": content}
        answer = {"role": "assistant", "content": "7"}
        assert tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True) == "3+4>"
        assert tokenizer.apply_chat_template([question, answer], tokenize=False) == "3+4>7<eos>"


def test_saved_and_built_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
