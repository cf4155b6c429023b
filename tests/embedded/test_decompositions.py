"""Chains taken apart by rule, chains made worse, and the decomposer that learned from both."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable

import pytest
import torch
import yaml
from decomposer import MAX_NEW_TOKENS, Trace, measure, trace_sets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distillkit import embedded
from distillkit.cli.shipped import find_config
from distillkit.data.prompts import prepare_prompts
from distillkit.data.sources import DataSource, read_source
from distillkit.decomposition import messages, parse, render
from distillkit.embedded.arithmetic import evaluate, held_out, sample_chain, split_of
from distillkit.embedded.corruptions import (
    CORRUPTIONS,
    any_order_chain,
    garbled,
    missing,
    reordered,
    repeated,
    wavering_chain,
    wrong,
)
from distillkit.embedded.decomposer_tokenizer import build_decomposer_tokenizer
from distillkit.embedded.decompositions import (
    Agreement,
    DecompositionRow,
    agreement,
    alignment,
    decompose,
    decomposition_rows,
    path,
)
from distillkit.errors import DataError
from distillkit.rewards.gsrm.local import LocalDecomposer

PROMPT, CHAIN = "3*2+4*5>", "3*2+0>6+0>6"


def steps_of(prompt: str, completion: str) -> list[tuple[str, str, str]]:
    return [(step.meta, step.question, step.answer) for step in decompose(prompt, completion).steps]


# The rule.


@pytest.mark.parametrize(
    ("prompt", "completion", "steps", "final"),
    [
        (PROMPT, CHAIN, [("product 3", "4*5", "0"), ("product 1", "3*2", "6"), ("sum 1", "6+0", "6")], "6"),
        ("9-2-3>", "9-9>0", [("difference 2", "2-3", "9"), ("difference 1", "9-9", "0")], "0"),
        # A wrong value is a step like any other.
        ("3+4*2>", "3+9>2", [("product 2", "4*2", "9"), ("sum 1", "3+9", "2")], "2"),
        # Steps left out, all but the answer, and everything.
        (PROMPT, "3*2+0>6", [("product 3", "4*5", "0"), ("other", "3*2+0", "6")], "6"),
        (PROMPT, "6", [("other", "3*2+4*5", "6")], "6"),
        (PROMPT, "", [("other", "3*2+4*5", "nothing")], ""),
        # Written again, and in another order.
        ("3+4*2>", "3+8>3+8>1", [("product 2", "4*2", "8"), ("other", "3+8", "3+8"), ("sum 1", "3+8", "1")], "1"),
        ("3+4*2>", "1>3+8", [("other", "3+4*2", "1"), ("other", "1", "3+8")], "3+8"),
        # Cut off, not an expression, white space.
        ("3+4*2>", "3+8>", [("product 2", "4*2", "8"), ("other", "3+8", "nothing")], ""),
        ("3+4*2>", "3+", [("other", "3+4*2", "3+")], "3+"),
        ("3+4*2>", " 3 \n+8>1", [("other", "3+4*2", "3 +8"), ("other", "3 +8", "1")], "1"),
        # Two readings: 4-0 = 4 may go next, 0-4 may not; 4-8 = 4 is nobody's value, 8-4 = 4 is right, if not allowed.
        ("4-0-4>", "4-4", [("difference 1", "4-0", "4")], "4-4"),
        ("4-8-4>", "4-4", [("difference 2", "8-4", "4")], "4-4"),
        # Two readings, both legal: the first.
        ("2*1*3>", "2*3", [("product 1", "2*1", "2")], "2*3"),
    ],
)
def test_a_completion_is_decomposed_by_rule(
    prompt: str, completion: str, steps: list[tuple[str, str, str]], final: str
) -> None:
    for problem in (prompt, prompt.removesuffix(">")):
        assert steps_of(problem, completion) == steps
        assert decompose(problem, completion).final == final


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        decompose("3+4=", "7")
    assert str(caught.value) == (
        "arithmetic: not an expression\n    got:      '3+4='\n"
        "    expected: one-digit operands joined by + - *, without spaces, such as '3+4*2'"
    )


def test_every_rule_based_decomposition_is_written_and_read_back() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.printable, k=rng.randrange(24))) for _ in range(300)]
    texts += [">\x1c\x85>\u2028 3\x0b>", "Answer: 3>Step 1\n3>"]
    for row, text in zip(held_out(), texts, strict=False):
        decomposition = decompose(row["prompt"], text)
        assert parse(render(decomposition)) == decomposition


def test_a_meta_reasoning_tells_the_choice_and_not_the_answer() -> None:
    rng = random.Random(0)
    for row in held_out()[:200]:
        chains = [sample_chain(row["prompt"][:-1], rng) for _ in range(2)]
        first, second = (decompose(row["prompt"], chain).steps for chain in chains)
        for ours, theirs in zip(first, second, strict=True):
            assert re.fullmatch(r"(sum|difference|product) [1-4]", ours.meta)
            if ours.meta != theirs.meta:
                break
            assert ours == theirs  # the same choices, the same steps: nothing else goes into the parts


# Measures.


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (CHAIN, 1.0),
        ("6+4*5>6+0>6", 0.0),  # the other product first: another branch
        ("3*2+0>6", 1 / 3),  # then a step is left out
        ("3*2+1>6+1>7", (1 / 2 + 1 + 1 / 4) / 3),  # one wrong digit: an answer, later a question and an answer differ
        ("3*2+0>6+0>6>6>6", 1.0),  # more than the reference is neither good nor bad
        ("", 0.0),
    ],
)
def test_alignment_with_a_reference(completion: str, value: float) -> None:
    assert alignment(PROMPT, completion, CHAIN) == pytest.approx(value)


def test_paths_of_legal_chains() -> None:
    assert path(PROMPT, CHAIN) == (2, 0, 0)
    assert path(PROMPT, "6+4*5>6+0>6") == (0, 1, 0)
    assert path(PROMPT, "3*6*5>8*5>0") is path(PROMPT, "6") is path(PROMPT, "3*2+1>6+1>7") is None


def test_agreement_counts_positions() -> None:
    expected = decompose("3+4*2>", "3+8>3+8>1")
    assert agreement(expected, expected) == Agreement(agreeing=3, predicted=3, expected=3)
    assert agreement(None, expected) == Agreement(agreeing=0, predicted=0, expected=3)
    found = agreement(decompose("3+4*2>", "3+8>1"), expected) + agreement(None, expected)
    assert found == Agreement(agreeing=1, predicted=2, expected=6)
    assert (found.precision, found.recall) == (1 / 2, 1 / 6)
    assert (Agreement().precision, Agreement().recall) == (0.0, 0.0)


# Corruptions.


def outcomes(corrupt: Callable[[str, str, random.Random], str], prompt: str, chain: str) -> set[str]:
    return {corrupt(prompt, chain, random.Random(seed)) for seed in range(400)}


def test_one_digit_is_wrong_and_the_rest_goes_on_from_it() -> None:
    first = {f"3+{d}>{(3 + d) % 10}" for d in range(10) if d != 8}
    last = {f"3+8>{d}" for d in range(10) if d != 1}
    assert outcomes(wrong, "3+4*2>", "3+8>1") == first | last
    # The order of steps stays: the sum, though illegal, then the product.
    assert "9*2>8" in outcomes(wrong, "3+4*2>", "7*2>4")


def test_neighbours_are_swapped() -> None:
    assert outcomes(reordered, PROMPT, CHAIN) == {"6+0>3*2+0>6", "3*2+0>6>6+0"}


def test_one_expression_is_missing() -> None:
    assert outcomes(missing, PROMPT, CHAIN) == {"6+0>6", "3*2+0>6", "3*2+0>6+0"}
    assert outcomes(missing, "3+4>", "7") == {""}


def test_one_expression_is_repeated() -> None:
    assert outcomes(repeated, PROMPT, CHAIN) == {"3*2+0>3*2+0>6+0>6", "3*2+0>6+0>6+0>6", "3*2+0>6+0>6>6"}


def test_slips_of_the_pen_are_of_every_kind() -> None:
    found = outcomes(garbled, "3+4*2>", "3+8>1")
    assert {"3+8>", "3+8>1>", "3+8>1>1", "3+8>1>3+8", "3+8>1>3+4*2", "+8>1", ""} <= found
    assert any(re.fullmatch(r"3\+\d>1", text) for text in found - {"3+8>1"})
    assert any(re.fullmatch(r"3\+8>1\d", text) for text in found)
    assert any(set(text) - set("0123456789+-*>") for text in found)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_follows_from_its_seed(name: str) -> None:
    chains = [[CORRUPTIONS[name](PROMPT, CHAIN, random.Random(seed)) for seed in range(20)] for _ in range(2)]
    assert chains[0] == chains[1]
    assert len(set(chains[0])) > 1


def test_chains_in_any_order_take_every_order_with_right_values() -> None:
    found = {any_order_chain("3*2+4", random.Random(seed)) for seed in range(50)}
    assert found == {"6+4>0", "3*6>8"}


def test_a_wavering_writer_begins_one_reduction_and_ends_with_another() -> None:
    found = {wavering_chain("3+8+6", random.Random(seed)) for seed in range(200)}
    assert found == {"1+6>7", "3+4>7", "1+4>5", "3+6>9"}


def test_chains_that_cannot_be_corrupted_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        reordered("3+4>", "7", random.Random(0))
    assert str(caught.value) == (
        "arithmetic corruption reordered: nothing to swap\n    got:      '7'\n    expected: at least 2 expressions"
    )
    with pytest.raises(DataError) as caught:
        wrong(PROMPT, "6", random.Random(0))
    assert str(caught.value) == (
        "arithmetic corruption wrong: cannot go on from this\n"
        "    got:      '6'\n    expected: a chain of single reductions"
    )


# The corpus.


@pytest.fixture(scope="module")
def corpus() -> list[DecompositionRow]:
    return decomposition_rows(3000)


def test_rows_are_what_the_rule_says(corpus: list[DecompositionRow]) -> None:
    for row in corpus:
        assert row["prompt"] == messages(row["problem"], row["trace"])
        assert parse(row["completion"]) == decompose(row["problem"], row["trace"])


def test_no_row_shows_a_problem_of_another_split(corpus: list[DecompositionRow]) -> None:
    for row in corpus:
        assert split_of(row["problem"].removesuffix(">")) == "train"
        written = re.findall(r"\d(?:[-+*]\d)*", row["trace"], re.ASCII)
        assert not {split_of(expression) for expression in written} & {"held_out", "validation"}


def test_every_kind_of_trace_is_in_the_corpus(corpus: list[DecompositionRow]) -> None:
    kinds = {name for row in corpus for name in row["kind"].split(", ")}
    assert kinds == {"reference", "careless", "any order", "wavering", *CORRUPTIONS}
    shares = {name: sum(name in row["kind"].split(", ") for row in corpus) / len(corpus) for name in kinds}
    assert min(shares.values()) > 0.05
    assert 0.45 < sum(row["problem"].endswith(">") for row in corpus) / len(corpus) < 0.55
    for row in corpus:
        if row["kind"] == "reference":
            assert all(step.meta != "other" for step in parse(row["completion"]).steps)
            assert parse(row["completion"]).final == str(evaluate(row["problem"].removesuffix(">")))


def test_rows_are_the_same_at_every_call(corpus: list[DecompositionRow]) -> None:
    assert decomposition_rows(3000) == corpus
    assert decomposition_rows(50, seed=1) != corpus[:50]


# The tokenizer.


@pytest.fixture(scope="module", params=["built", "saved"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    folder = embedded.resolve("embedded:decomposer")
    return build_decomposer_tokenizer() if request.param == "built" else AutoTokenizer.from_pretrained(folder)


def test_the_saved_tokenizer_is_the_built_one() -> None:
    built, folder = build_decomposer_tokenizer(), embedded.MODELS["embedded:decomposer"]
    saved = AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(built.backend_tokenizer.to_str())
    assert saved.chat_template == built.chat_template
    assert saved.special_tokens_map == built.special_tokens_map
    assert (saved.padding_side, saved.model_max_length) == (built.padding_side, built.model_max_length)


def test_decompositions_survive_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, corpus: list[DecompositionRow]
) -> None:
    for row in corpus[:500]:
        ids = tokenizer(row["completion"])["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["completion"]
        if row["kind"] == "reference":
            assert len(ids) == 7 * len(parse(row["completion"]).steps) + 2


def test_any_printable_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices([*string.printable[:95], "\n", "Step 1\n", "\nAnswer: ", "other", "sum 1"], k=30))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id] == [2]


def test_the_grammar_is_in_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    written = render(decompose(PROMPT, ">" * 23))  # 24 steps
    pieces = [token for token in tokenizer.tokenize(written) if len(token) > 1]
    assert sum(token.endswith("Meta-reasoning: ") for token in pieces) == 24
    assert tokenizer.tokenize(written)[-1] == "\nFinal answer:"
    assert tokenizer.tokenize("\nFinal answer: 6") == ["\nFinal answer: ", "6"]


def test_the_system_message_is_left_out_and_an_answer_is_closed(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = messages("3+4", "7")
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{asked[1]['content']}\n\nDecomposition:\n"
    answer = {"role": "assistant", "content": "Step 1"}
    assert tokenizer.apply_chat_template([*asked, answer], tokenize=False) == f"{prompt}Step 1<eos>"
    assert tokenizer.tokenize(prompt) == ["Problem:\n", "3+", "4", "\n\nReasoning:\n", "7", "\n\nDecomposition:\n"]


# The model.


def test_the_recipe_describes_the_decomposer() -> None:
    recipe = yaml.safe_load(find_config("embedded_decomposer").read_text())
    folder = embedded.MODELS["embedded:decomposer"]
    config, entries = json.loads((folder / "config.json").read_text()), recipe["model"]["init_args"]["init"]
    assert {key: config[key] for key in entries} == entries
    assert config["vocab_size"] == len(build_decomposer_tokenizer())
    assert (folder / "model.safetensors").stat().st_size < 4 * 2**20
    assert recipe["data"]["train"]["path"] == "embedded:arithmetic/decompositions"


def test_what_it_is_trained_on_is_what_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "DECOMPOSITION_ROWS", 40)
    tokenizer = build_decomposer_tokenizer()
    source = DataSource(path="embedded:arithmetic/decompositions")
    prepared = prepare_prompts(read_source(source), source, tokenizer, completions=True)
    assert len(prepared) == 40
    for item in prepared:
        asked = tokenizer.apply_chat_template(messages(item.row["problem"], item.row["trace"]), tokenize=False)
        assert list(item.prompt_ids) == tokenizer(asked)["input_ids"]
        assert item.completion_ids is not None and item.completion_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(item.completion_ids, skip_special_tokens=True) == item.row["completion"]


@pytest.fixture(scope="module")
def unseen() -> dict[str, list[Trace]]:
    return trace_sets()


@pytest.fixture(scope="module")
def decomposer() -> LocalDecomposer:
    shipped = LocalDecomposer(path="embedded:decomposer", max_new_tokens=MAX_NEW_TOKENS)
    shipped.setup(torch.device("cpu"))
    return shipped


def test_the_decomposer_takes_a_chain_apart(decomposer: LocalDecomposer) -> None:
    assert decomposer.decompose([(PROMPT, CHAIN)]) == [decompose(PROMPT, CHAIN)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["reference chains", "careless chains", "student's rollouts", "teacher's rollouts", *CORRUPTIONS],
)
def test_the_decomposer_agrees_with_the_rule(
    name: str, unseen: dict[str, list[Trace]], decomposer: LocalDecomposer
) -> None:
    found = measure(decomposer, unseen[name][:300])
    assert found.steps.expected >= 500
    assert found.steps.precision >= 0.95
    assert found.steps.recall >= 0.95
