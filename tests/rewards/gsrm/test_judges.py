"""Judges: what agrees, what does not, and what is neither."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.errors import ConfigError, ModelError, ScoringError
from distillkit.rewards.gsrm.judge import ExactJudge, OverlapJudge, Part, StepPair, normal_text, token_overlap
from distillkit.rewards.gsrm.local_judge import LocalJudge
from distillkit.rewards.gsrm.questions import question, verdict
from distillkit.rewards.gsrm.server_judge import ServerJudge
from tests.rewards.gsrm import markov
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says

CPU = torch.device("cpu")


def pair(ours: str, theirs: str, kind: Part = "answer") -> StepPair:
    return StepPair(kind=kind, ours=ours, theirs=theirs, problem="3+4*2")


DIFFERENT = pair("8", "9")


@pytest.mark.parametrize(
    ("ours", "theirs", "agrees"),
    [
        ("the product first", "The  product\tFIRST.", True),
        ("4*2", "4*3", False),
        ("−2", "-2", True),
        ("e\u0301t", "ét", True),
        ("x²", "x2", False),
        ("5!", "5", False),
        ("is it 4?", "is it 4", True),
        ("no", "know", False),
        ("", "", True),
        (".5", "5", False),
        ("1.", "1", True),
    ],
)
def test_exact(ours: str, theirs: str, agrees: bool) -> None:
    assert ExactJudge().agree([pair(ours, theirs)]) == [agrees]
    assert (normal_text(ours) == normal_text(theirs)) is agrees


@pytest.mark.parametrize(
    ("one", "other", "f1"),
    [
        ("a b c", "a b c", 1.0),
        ("a b c d", "a b", 2 * 2 / 6),
        ("a a b", "a b b", 2 * 2 / 6),  # bags: one a and one b are shared
        ("4*2", "4+2", 2 * 2 / 6),  # an operator is a token
        ("1,000 apples", "1,000 Apples!", 1.0),
        ("1.5", "15", 0.0),
        ("a", "b", 0.0),
        ("...", "...", 1.0),
        ("...", "a", 0.0),
        ("()", "[]", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_overlap(one: str, other: str, f1: float) -> None:
    assert token_overlap(one, other) == pytest.approx(f1)
    assert token_overlap(other, one) == pytest.approx(f1)


def test_overlap_decides_at_its_threshold() -> None:
    same, half = pair("a b c d", "a b c d"), pair("a b c d", "a b x y")
    assert OverlapJudge(threshold=0.5).agree([same, half]) == [True, True]
    assert OverlapJudge(threshold=0.51).agree([half, same]) == [False, True]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_an_impossible_threshold(threshold: float) -> None:
    with pytest.raises(ConfigError) as caught:
        OverlapJudge(threshold=threshold)
    assert str(caught.value) == (
        f"model.rewards: gsrm.judge.threshold\n    got:      {threshold}\n    expected: above 0 and at most 1"
    )


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("yes", True),
        ("No", False),
        (" YES!\n", True),
        ("**no**", False),
        ('"Yes."', True),
        ("<think>They differ? no, no.</think>\n\nyes", True),
        ("not", None),
        ("know", None),
        ("nobody", None),
        ("I know, yes", None),
        ("no, yes", None),
        ("yes and no", None),
        ("none", None),
        ("yesterday", None),
        ("n", None),
        ("y", None),
        ("", None),
        ("<think>no", None),
    ],
)
def test_a_reply_is_the_word_or_nothing(reply: str, said: bool | None) -> None:
    assert verdict(reply) is said


@pytest.mark.parametrize("kind", ["meta", "question", "answer"])
def test_what_is_asked_holds_both_texts_and_both_words(kind: Part) -> None:
    [message] = question(StepPair(kind=kind, ours="OURS", theirs="THEIRS", problem="PROBLEM"))
    assert message["role"] == "user"
    assert all(word in message["content"] for word in ("PROBLEM", "OURS", "THEIRS"))
    assert message["content"].endswith(" Answer with one word, yes or no.")


WORDS = ("yes", "Yes", "YES", "no", "No", "NO")


def local(tmp_path: Path, after: dict[str, float], **options: Any) -> LocalJudge:
    """A judge whose model continues the question (which ends with a full stop) with these tokens; yes, no are some."""
    table: dict[str, dict[str, float]] = {".": after, **options.pop("table", {})}
    path = markov.save(tmp_path / "judge", table, **{"phrases": WORDS, **options.pop("model", {})})
    judge = LocalJudge(path=path, **options)
    judge.setup(CPU)
    return judge


@pytest.mark.parametrize(
    ("after", "floor", "said"),
    [
        ({"yes": 0.9, "no": 0.1}, 0.5, True),
        ({"yes": 0.1, "no": 0.9}, 0.5, False),
        ({"Yes": 0.3, "yes": 0.3, "no": 0.4}, 0.5, True),  # both spellings of yes count
        ({"No": 0.25, "no": 0.26, "yes": 0.49}, 0.5, False),
        ({"yes": 0.04, "no": 0.03, "m": 0.93}, 0.1, None),  # it says something else
        ({"yes": 0.04, "no": 0.03, "m": 0.93}, 0.05, True),
        ({"m": 1.0}, 0.1, None),
        ({"m": 1.0}, 0.0, None),  # e^-60 of each: neither, even without a floor
    ],
)
def test_a_local_model_says_yes_no_or_neither(
    tmp_path: Path, after: dict[str, float], floor: float, said: bool | None
) -> None:
    judge = local(tmp_path, after, floor=floor)
    assert judge.agree([DIFFERENT]) == [said]
    # A pair's verdict does not depend on the others beside it, nor on their lengths.
    longer = pair("8" * 40, "9", "meta")
    assert judge.agree([longer, DIFFERENT, pair("same", "Same."), longer]) == [said, said, True, said]
    small = local(tmp_path, after, floor=floor, tokens_per_batch=1)
    assert small.agree([longer, DIFFERENT]) == [said, said]


def test_answers_that_begin_alike_are_compared_whole(tmp_path: Path) -> None:
    """`same` and `so-so` begin with s: the first token is certain and says nothing."""
    for second, third, said in (
        ({"a": 0.7, "o": 0.3}, 1.0, True),
        ({"a": 0.3, "o": 0.7}, 1.0, False),
        ({"a": 0.7, "o": 0.3}, 0.2, False),  # "sa" is likely, "same" (and its end) is not
    ):
        table = {
            "s": second,
            "a": {"m": 1.0},
            "m": {"e": third, "x": 1 - third} if third < 1 else {"e": 1.0},
            "e": {markov.END: 1.0},
            "o": {markov.END: 1.0},
        }
        judge = local(tmp_path, {"s": 1.0}, table=table, yes="same", no="so", floor=0.3)
        assert judge.agree([DIFFERENT]) == [said]


def test_an_answer_that_only_begins_another_word_is_not_that_answer(tmp_path: Path) -> None:
    """Whole answers include their end: "so" in "soon" is not "so"."""
    table = {"s": {"a": 0.4, "o": 0.6}, "a": {markov.END: 1.0}, "o": {"o": 0.9, markov.END: 0.1}}
    assert local(tmp_path, {"s": 1.0}, table=table, yes="sa", no="so").agree([DIFFERENT]) == [True]


@pytest.mark.parametrize(
    ("end", "floor", "said"),
    [
        (1e-9, 0.1, None),  # "not sure" begins with n, and with no, and is no "no"
        (1e-9, 0.0, False),
        (0.5, 0.1, False),
    ],
)
def test_a_word_of_several_tokens_counts_with_its_end_only(
    tmp_path: Path, end: float, floor: float, said: bool | None
) -> None:
    table = {"n": {"o": 1.0}, "o": {"t": 1.0 - end, markov.END: end}, "y": {"e": 1.0}, "e": {"s": 1.0}, "s": {"s": 1.0}}
    options: dict[str, Any] = {"table": table, "model": {"phrases": ()}, "floor": floor}
    assert local(tmp_path, {"n": 0.9, "y": 0.1}, **options).agree([DIFFERENT]) == [said]


def test_words_that_begin_like_an_answer_in_capitals_do_not_reach_the_floor(tmp_path: Path) -> None:
    """yes and no are tokens, YES and NO are not: "Y" begins "You" as well."""
    table = {"Y": {"o": 1.0}, "N": {"o": 1.0}, "o": {"u": 1.0}, "u": {"u": 1.0}}
    options: dict[str, Any] = {"table": table, "model": {"phrases": ("yes", "Yes", "no", "No")}}
    assert local(tmp_path, {"Y": 0.5, "N": 0.44, "yes": 0.04, "no": 0.02}, **options).agree([DIFFERENT]) == [None]
    assert local(tmp_path, {"Y": 0.5, "N": 0.3, "yes": 0.04, "no": 0.16}, **options).agree([DIFFERENT]) == [False]


def test_every_end_of_a_reply_ends_an_answer(tmp_path: Path) -> None:
    """The template's end of turn may be no end token of the tokenizer, only one of the generation config."""
    table = {"n": {"o": 1.0}, "o": {"<turn>": 1.0}}
    judge = local(tmp_path, {"n": 1.0}, table=table, model={"phrases": ("<turn>",)})
    assert judge.agree([DIFFERENT]) == [None]
    turn = markov.tokenizer(("<turn>",)).convert_tokens_to_ids("<turn>")
    (tmp_path / "judge" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, turn]}))
    judge.setup(CPU)
    assert judge.agree([DIFFERENT]) == [False]


def test_local_probabilities_are_the_models_own(tmp_path: Path) -> None:
    judge = local(tmp_path, {"yes": 0.3, "Yes": 0.2, "no": 0.1, "No": 0.05, "m": 0.35})
    model = judge._model
    assert model is not None
    prompts = [model.prompt(question(DIFFERENT)), model.prompt(question(pair("1", "22", "meta")))]
    torch.testing.assert_close(judge._mass(model, prompts), torch.tensor([[0.5, 0.15]] * 2), rtol=1e-3, atol=1e-5)


def test_a_question_longer_than_the_context_is_neither(tmp_path: Path) -> None:
    short = pair("8", "9")
    fits = len(markov.tokenizer(WORDS)(question(short)[0]["content"])["input_ids"]) + 2  # the word and an end
    judge = local(tmp_path, {"yes": 1.0}, model={"context": fits})
    assert judge.agree([short, pair("88", "9"), pair("8", "9")]) == [True, None, True]


def test_an_equal_pair_needs_no_model(tmp_path: Path) -> None:
    judge = local(tmp_path, {"no": 1.0})
    assert judge.agree([pair("The product.", "the  product"), DIFFERENT]) == [True, False]
    assert judge.agree([]) == []


def test_a_local_judge_before_setup_and_after_teardown(tmp_path: Path) -> None:
    judge = local(tmp_path, {"yes": 1.0})
    judge.teardown()
    with pytest.raises(ScoringError) as caught:
        judge.agree([DIFFERENT])
    assert str(caught.value) == ("LocalJudge.agree\n    got:      called before setup\n    try:      call setup first")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"floor": 1.5}, "model.rewards: gsrm.judge.floor\n    got:      1.5\n    expected: a probability, 0 to 1"),
        (
            {"yes": "Yes", "no": "yes"},
            "model.rewards: gsrm.judge: yes and no\n    got:      'Yes', 'yes'\n    expected: two different words",
        ),
        (
            {"tokens_per_batch": 0},
            "model.rewards: gsrm.judge.tokens_per_batch\n    got:      0\n    expected: at least 1 token",
        ),
    ],
)
def test_arguments_of_the_local_judge(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalJudge(path="somewhere", **arguments)
    assert str(caught.value) == text


def test_a_model_without_a_chat_template_cannot_be_asked(tmp_path: Path) -> None:
    path = markov.save(tmp_path / "judge", {})
    words = markov.tokenizer()
    words.chat_template = None
    words.save_pretrained(path)
    (tmp_path / "judge" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError) as caught:
        LocalJudge(path=path).setup(CPU)
    assert str(caught.value) == (
        "model.rewards: gsrm.judge.path: the tokenizer has no chat template\n"
        f"    got:      {path}\n"
        "    try:      a chat model, or one trained as docs/structure_reward.md shows"
    )


def server_judge(url: str, **options: Any) -> ServerJudge:
    judge = ServerJudge(**{"base_url": url, "model": "judge", "backoff_s": 0.0, "retries": 1, **options})
    judge.setup(CPU)
    return judge


def test_a_server_is_asked_for_one_word_and_believed_by_the_word() -> None:
    words = {"a": "yes", "b": "No.", "c": "not", "d": "know", "e": "I know, yes", "f": "nobody", "g": "", "h": "Yes!"}

    def answers(body: Any, number: int) -> Answer:
        ours = body["messages"][-1]["content"].split("First solution, answer to the sub-problem:\n")[1][0]
        return says(words[ours])

    with chat_server(answers) as server:
        judge = server_judge(server.url, concurrency=3)
        said = judge.agree([pair(letter, "z") for letter in words])
        judge.teardown()
    assert said == [True, False, None, None, None, None, None, True]
    assert 1 <= server.at_once <= 3
    body = server.asked[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 8)
    assert set(body) == {"model", "temperature", "max_tokens", "messages"}


@pytest.mark.parametrize(
    ("constrained", "entry"),
    [
        ("structured_outputs", {"structured_outputs": {"choice": ["yes", "no"]}}),
        ("guided_choice", {"guided_choice": ["yes", "no"]}),
    ],
)
def test_a_server_can_be_made_to_choose(constrained: Any, entry: dict[str, Any]) -> None:
    with chat_server([says("no")]) as server:
        judge = server_judge(server.url, constrained=constrained, extra_body={"seed": 3})
        assert judge.agree([DIFFERENT, pair("same", "same")]) == [False, True]
        judge.teardown()
    [asked] = server.asked  # the equal pair was not asked about
    assert asked.body.items() >= {**entry, "seed": 3}.items()


def test_a_server_that_fails_says_neither(caplog: pytest.LogCaptureFixture) -> None:
    with chat_server([Answer({"error": "busy"}, status=503)]) as server:
        judge = server_judge(server.url)
        assert judge.agree([DIFFERENT]) == [None]
        judge.teardown()
    assert len(server.asked) == 2
    judge = server_judge(nobody())
    assert judge.agree([DIFFERENT, pair("same", "same")]) == [None, True]
    judge.teardown()
    assert "HTTP 503" in caplog.text and "cannot connect" in caplog.text


def test_an_unknown_constraint() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerJudge(base_url="http://a", model="m", constrained="grammar")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "model.rewards: gsrm.judge.constrained\n    got:      'grammar'\n"
        "    expected: none or structured_outputs or guided_choice"
    )


def test_the_floor_is_on_the_sum_of_both_answers(tmp_path: Path) -> None:
    after = {"yes": 0.06, "no": 0.05, "m": 0.89}
    assert math.isclose(after["yes"] + after["no"], 0.11)
    assert local(tmp_path, after, floor=0.105).agree([DIFFERENT]) == [True]
    assert local(tmp_path, after, floor=0.115).agree([DIFFERENT]) == [None]
