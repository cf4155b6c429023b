"""Rows become exactly the token ids that the model should see, and no row is lost without being counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from distillkit.data import DataSource, PromptSet, prepare_prompts, read_source
from distillkit.errors import DataError

Jsonl = Callable[..., str]


@pytest.fixture
def prepare(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PromptSet]:
    def run(source: DataSource, **settings: Any) -> PromptSet:
        return prepare_prompts(read_source(source), source, tokenizer, **settings)

    return run


@pytest.fixture
def refused(prepare: Callable[..., PromptSet]) -> Callable[..., str]:
    def run(source: DataSource, **settings: Any) -> str:
        with pytest.raises(DataError) as caught:
            prepare(source, **settings)
        return str(caught.value)

    return run


Prepare = Callable[..., PromptSet]
Refused = Callable[..., str]


def shown(prompts: PromptSet, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(prompt.prompt_ids) for prompt in prompts]


# TRL's prompt-only and prompt-completion types, standard and conversational, as its documentation shows them.
TRL_TEXT = [{"prompt": "The sky is"}, {"prompt": "The sun is"}]
TRL_MESSAGES = [{"prompt": [{"role": "user", "content": "What color is the sky?"}]}]
TRL_TEXT_COMPLETION = [{"prompt": "The sky is", "completion": " blue."}]
TRL_MESSAGES_COMPLETION = [
    {
        "prompt": [{"role": "user", "content": "What color is the sky?"}],
        "completion": [{"role": "assistant", "content": "It is blue."}],
    }
]


def save(rows: list[dict[str, Any]], kind: str, folder: Path, jsonl: Jsonl) -> str:
    if kind == "jsonl":
        return jsonl(rows)
    path = str(folder / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trl_prompt_datasets_load_unmapped(
    kind: str, tmp_path: Path, jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = prepare(DataSource(path=save(TRL_TEXT, kind, tmp_path, jsonl)))
    assert shown(text, tokenizer) == ["<s>The sky is", "<s>The sun is"]
    assert text[0].prompt == "The sky is" and text[0].row == TRL_TEXT[0]
    messages = prepare(DataSource(path=save(TRL_MESSAGES, kind, tmp_path, jsonl)))
    assert shown(messages, tokenizer) == ["<s>[user]What color is the sky?</s>[assistant]"]
    assert messages[0].prompt == TRL_MESSAGES[0]["prompt"]
    assert messages[0].completion_ids is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trl_prompt_completion_datasets_load_unmapped(
    kind: str, tmp_path: Path, jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    for rows, prompt, completion in (
        (TRL_TEXT_COMPLETION, "<s>The sky is", " blue.</s>"),
        (
            TRL_MESSAGES_COMPLETION,
            "<s>[user]What color is the sky?</s>[assistant]",
            "It is blue.</s>",
        ),
    ):
        [prepared] = prepare(DataSource(path=save(rows, kind, tmp_path, jsonl)), completions=True)
        assert prepared.completion_ids is not None
        assert tokenizer.decode(prepared.prompt_ids) == prompt
        assert tokenizer.decode(prepared.completion_ids) == completion


def test_text_completion_after_a_chat_prompt(
    jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = DataSource(path=jsonl(TRL_TEXT_COMPLETION), chat="always")
    [prepared] = prepare(source, completions=True)
    assert prepared.completion_ids is not None
    assert tokenizer.decode(prepared.prompt_ids) == "<s>[user]The sky is</s>[assistant]"
    assert tokenizer.decode(prepared.completion_ids) == " blue.</s>"


def test_rendered_chat_prompts_get_no_second_bos(
    jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    [prompt] = prepare(DataSource(path=jsonl(TRL_MESSAGES)))
    bos = tokenizer.bos_token_id
    assert prompt.prompt_ids[0] == bos and prompt.prompt_ids.count(bos) == 1
    # The tokenizer's own rendering, in one go, is the oracle.
    whole = tokenizer.apply_chat_template(TRL_MESSAGES[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert list(prompt.prompt_ids) == whole


def test_text_and_messages_in_one_file(jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = prepare(DataSource(path=jsonl([*TRL_TEXT, *TRL_MESSAGES, *TRL_TEXT])))
    assert shown(prompts, tokenizer) == [
        "<s>The sky is",
        "<s>The sun is",
        "<s>[user]What color is the sky?</s>[assistant]",
        "<s>The sky is",
        "<s>The sun is",
    ]


def test_system_prompt_chat_always_and_template_arguments(
    jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = DataSource(
        path=jsonl([{"prompt": "2+3?"}]),
        chat="always",
        system_prompt="Be brief.",
        chat_template_kwargs={"quick": True},
    )
    [prompt] = prepare(source)
    assert tokenizer.decode(prompt.prompt_ids) == "<s>[system]Be brief.</s>[user]2+3?</s>[assistant]!"
    assert prompt.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+3?"}]
    [prompt] = prepare(DataSource(path=jsonl([{"prompt": own}]), system_prompt="Be brief."))
    assert tokenizer.decode(prompt.prompt_ids) == "<s>[system]Be kind.</s>[user]2+3?</s>[assistant]"


def test_messages_that_end_with_the_assistant_are_continued(
    jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "It is"}]
    [prompt] = prepare(DataSource(path=jsonl([{"prompt": messages}])))
    assert tokenizer.decode(prompt.prompt_ids) == "<s>[user]2+3?</s>[assistant]It is"


def test_keys_that_only_other_messages_have_are_not_shown_to_the_template(tmp_path: Path, prepare: Prepare) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "a", "name": None}]},
        {"prompt": [{"role": "user", "content": "b", "name": "Ann"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    prompts = prepare(DataSource(path=str(tmp_path / "rows.parquet")))
    assert prompts[0].prompt == [{"role": "user", "content": "a"}]
    assert prompts[1].prompt == [{"role": "user", "content": "b", "name": "Ann"}]


def test_columns_and_template(jsonl: Jsonl, prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"problem": "2+3?", "solution": 5, "level": 0.5}]
    source = DataSource(path=jsonl(rows), columns={"prompt": "problem", "answer": "solution"})
    [prompt] = prepare(source)
    assert prompt.prompt == "2+3?"
    assert prompt.row == {"problem": "2+3?", "solution": 5, "level": 0.5, "prompt": "2+3?", "answer": 5}
    source = DataSource(
        path=jsonl(rows), columns={"question": "problem"}, template="{question!s} ({level:.2f}) \\boxed{{}}\nA:"
    )
    assert shown(prepare(source), tokenizer) == ["<s>2+3? (0.50) \\boxed{}\nA:"]


def test_over_long_prompts_are_dropped_and_counted(jsonl: Jsonl, prepare: Prepare) -> None:
    source = DataSource(path=jsonl([{"prompt": "x" * n} for n in (3, 9, 4, 20, 5)]))
    prompts = prepare(source, max_prompt_tokens=6)
    assert [prompt.index for prompt in prompts] == [0, 2, 4]
    assert [len(prompt.prompt_ids) for prompt in prompts] == [4, 5, 6]
    report = prompts.report
    assert (report.rows, report.kept, report.dropped_too_long) == (5, 3, 2)
    assert (report.longest_prompt, report.longest_dropped) == (6, 21)
    assert str(report) == (f"data.train: 3 of 5 rows from {source.path}; 2 dropped: prompt too long (up to 21 tokens)")
    assert len(prepare(source)) == 5


def test_over_long_completions_are_dropped_and_counted(jsonl: Jsonl, prepare: Prepare) -> None:
    rows = [{"prompt": "x" * p, "completion": "y" * c} for p, c in ((1, 9), (1, 2), (9, 9), (9, 1))]
    source = DataSource(path=jsonl(rows))
    prompts = prepare(source, completions=True, max_prompt_tokens=5, max_completion_tokens=4)
    assert [prompt.index for prompt in prompts] == [1]
    report = prompts.report
    assert (report.rows, report.kept, report.dropped_too_long, report.dropped_completion_too_long) == (4, 1, 2, 1)


def test_every_row_dropped(jsonl: Jsonl, refused: Refused) -> None:
    source = DataSource(path=jsonl([{"prompt": "x" * n} for n in (8, 5)]))
    assert refused(source, max_prompt_tokens=4) == (
        "data.train: every row was dropped\n"
        "    got:      2 rows, prompts of 6 to 9 tokens\n"
        "    expected: at most 4 tokens\n"
        "    try:      raise data.max_prompt_tokens"
    )


def test_missing_prompt_column(jsonl: Jsonl, refused: Refused) -> None:
    assert refused(DataSource(path=jsonl([{"id": 1, "question": "2+3?"}]))) == (
        "data.train: no column 'prompt'\n"
        "    got:      columns id, question\n"
        "    expected: prompt\n"
        "    try:      data.train.columns: {prompt: question}"
    )
    assert refused(DataSource(path=jsonl([{"id": 1, "promt": "2+3?"}])), where="data.val[0].source") == (
        "data.val[0].source: no column 'prompt'\n"
        "    got:      columns id, promt\n"
        "    expected: prompt\n"
        "    try:      data.val[0].source.columns: {prompt: promt}"
    )


def test_missing_mapped_column(jsonl: Jsonl, refused: Refused) -> None:
    source = DataSource(path=jsonl([{"question": "2+3?", "answer": "5"}]), columns={"prompt": "qestion"})
    assert refused(source) == (
        "data.train.columns.prompt: no column 'qestion'\n    got:      columns question, answer\n    try:      question"
    )


def test_missing_completion_column(jsonl: Jsonl, refused: Refused) -> None:
    source = DataSource(path=jsonl([{"prompt": "2+3?", "chain": "5"}]))
    assert refused(source, completions=True) == (
        "data.train: no column 'completion'\n"
        "    got:      columns prompt, chain\n"
        "    expected: completion\n"
        "    try:      data.train.columns: {completion: <their column>}"
    )


@pytest.mark.parametrize(
    ("template", "what", "expected", "hint"),
    [
        ("{qestion}?", "no column 'qestion'", "one of question, answer", "{question}"),
        (
            "\\boxed{}: {question}",
            "no column ''",
            "one of question, answer",
            "write {{ and }} for braces that are text",
        ),
        ("{question.__class__}", "no column 'question.__class__'", "one of question, answer", "{question}"),
        (
            "\\frac{question",
            "expected '}' before end of string",
            None,
            "write {{ and }} for braces that are text",
        ),
    ],
)
def test_bad_template(
    template: str, what: str, expected: str | None, hint: str, jsonl: Jsonl, refused: Refused
) -> None:
    source = DataSource(path=jsonl([{"question": "2+3?", "answer": "5"}]), template=template)
    assert refused(source) == (
        f"data.train.template: {what}\n    got:      {template!r}\n"
        + (f"    expected: {expected}\n" if expected else "")
        + f"    try:      {hint}"
    )


TEXT_OR_MESSAGES = "text, or a list of messages {role: ..., content: text}"


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "nothing"),
        ("  ", "empty text"),
        (7, "a int: 7"),
        ([], "an empty list"),
        (["hi"], "message 0 is a str: 'hi'"),
        ([{"content": "hi"}], "message 0 is a dict: {'content': 'hi'}"),
        ([{"role": "user", "content": 5}], "message 0 has as content a int: 5"),
        ([{"role": "user"}], "message 0 has as content nothing"),
        (
            [{"role": "system", "content": "hi"}],
            "messages that end with the role 'system', not user, tool or assistant",
        ),
    ],
)
def test_unusable_prompt(value: Any, got: str, jsonl: Jsonl, refused: Refused) -> None:
    path = jsonl([{"prompt": "fine"}, {"prompt": value}, {"prompt": "fine"}])
    assert refused(DataSource(path=path)) == (
        f"data.train: {path}, line 2, column 'prompt': unusable\n"
        f"    got:      {got}\n"
        f"    expected: {TEXT_OR_MESSAGES}\n"
        "    try:      repair or remove the row"
    )


def test_several_unusable_rows_are_told_at_once(jsonl: Jsonl, refused: Refused) -> None:
    path = jsonl([{"prompt": "fine"}, {}, {"prompt": ""}, {"prompt": 3}, {"prompt": "fine"}, {"prompt": 4}, {}])
    assert refused(DataSource(path=path)) == (
        f"data.train: {path}, line 2, column 'prompt': unusable"
        f" (and 4 more: {path}, line 3, {path}, line 4, {path}, line 6, …)\n"
        "    got:      nothing\n"
        f"    expected: {TEXT_OR_MESSAGES}\n"
        "    try:      repair or remove the row"
    )


def test_unusable_template_value(jsonl: Jsonl, refused: Refused) -> None:
    path = jsonl([{"question": "2+3?", "level": 1}, {"question": "2+4?", "level": "hard"}])
    assert refused(DataSource(path=path, template="{question} {level:.1f}")) == (
        f"data.train: {path}, line 2, column 'level': unusable\n"
        "    got:      a str: 'hard' (Unknown format code 'f' for object of type 'str')\n"
        "    expected: a value that the template can take\n"
        "    try:      repair or remove the row"
    )


def test_unusable_completion(jsonl: Jsonl, refused: Refused) -> None:
    path = jsonl([{"prompt": "a", "completion": ""}])
    assert refused(DataSource(path=path), completions=True) == (
        f"data.train: {path}, line 1, column 'completion': unusable\n"
        "    got:      an empty str\n"
        f"    expected: {TEXT_OR_MESSAGES}\n"
        "    try:      repair or remove the row"
    )


def test_chat_settings_that_do_not_fit_the_prompts(
    jsonl: Jsonl, refused: Refused, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert refused(DataSource(path=jsonl(TRL_MESSAGES), chat="never")) == (
        "data.train: the prompts are messages\n"
        "    got:      chat: never\n"
        "    expected: text\n"
        "    try:      set data.train.chat to auto"
    )
    assert refused(DataSource(path=jsonl(TRL_TEXT), system_prompt="Be brief.")) == (
        "data.train.system_prompt: only for messages\n"
        "    got:      text prompts, chat: auto\n"
        "    try:      set data.train.chat to always, or write the text into data.train.template"
    )
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    source = DataSource(path=jsonl(TRL_MESSAGES))
    with pytest.raises(DataError) as caught:
        prepare_prompts(read_source(source), source, plain)
    assert str(caught.value).splitlines()[0] == "data.train: the student's tokenizer has no chat template"
    assert str(caught.value).splitlines()[2] == (
        "    try:      use a student whose tokenizer has one, or text prompts with data.train.chat: never"
    )


def test_a_chat_template_that_refuses_the_messages_names_the_row(
    jsonl: Jsonl, tokenizer: PreTrainedTokenizerFast
) -> None:
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="</s>",
        chat_template="{{ raise_exception('roles must alternate') }}",
    )
    source = DataSource(path=jsonl(TRL_MESSAGES))
    with pytest.raises(DataError) as caught:
        prepare_prompts(read_source(source), source, strict)
    assert str(caught.value) == (
        f"data.train: {source.path}, line 1, column 'prompt': unusable\n"
        "    got:      messages that the chat template refuses (roles must alternate)\n"
        f"    expected: {TEXT_OR_MESSAGES}\n"
        "    try:      repair or remove the row"
    )


def test_fingerprint_follows_content_and_tokens(jsonl: Jsonl, prepare: Prepare) -> None:
    path = jsonl([{"question": "2+3?", "answer": "5"}])
    first = prepare(DataSource(path=path, template="{question}")).fingerprint()
    assert prepare(DataSource(path=path, template="{question}")).fingerprint() == first
    other = prepare(DataSource(path=path, template="{question} ")).fingerprint()
    assert other["content"] == first["content"] and other["tokens"] != first["tokens"]
    jsonl([{"question": "2+3?", "answer": "6"}])
    changed = prepare(DataSource(path=path, template="{question}")).fingerprint()
    assert changed["content"] != first["content"] and changed["tokens"] == first["tokens"]


def test_rows_for_start_up_checks_include_dropped_ones(jsonl: Jsonl, prepare: Prepare) -> None:
    path = jsonl([{"q": "x" * n, "a": n} for n in (9, 1)])
    prompts = prepare(DataSource(path=path, columns={"prompt": "q", "answer": "a"}), max_prompt_tokens=5)
    assert [row["answer"] for row in prompts.our_rows()] == [9, 1]
    assert prompts.rows.place(prompts[0].index) == f"{path}, line 2"
