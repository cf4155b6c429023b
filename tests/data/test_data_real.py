"""Real problem sets, as they come: every row becomes a prompt, every value stays what the file says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerFast

from distillkit.data import DataSource, PromptData, prepare_prompts, read_source

DATA = Path(os.environ.get("DISTILLKIT_DATA") or Path(__file__).parents[2] / "../shared/data").resolve()
CONFIGS = Path(__file__).parents[2] / "configs"


def real(name: str) -> str:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there: the real problem sets are not part of the package; set DISTILLKIT_DATA")
    return str(path)


@pytest.mark.parametrize(
    ("name", "rows", "question", "columns"),
    [
        ("gsm8k/train.jsonl", 7473, "question", ("question", "answer")),
        ("gsm8k/test.jsonl", 1319, "question", ("question", "answer")),
        (
            "math/math500.jsonl",
            500,
            "problem",
            ("problem", "solution", "answer", "subject", "level", "unique_id"),
        ),
        ("aime/aime24.jsonl", 30, "problem", None),
        ("aime/aime_2021_2024.jsonl", 103, "question", ("question", "answer", "year", "id", "problem_number")),
        ("amc/amc23.jsonl", 40, "problem", ("id", "problem", "answer", "url", "question")),
    ],
)
def test_problem_files(
    name: str, rows: int, question: str, columns: tuple[str, ...] | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = DataSource(path=real(name), columns={"prompt": question}, template="{prompt}\nAnswer:")
    raw = read_source(source)
    assert len(raw) == rows
    assert columns is None or raw.columns == columns
    with open(real(name), encoding="utf-8") as stream:
        assert list(raw) == [json.loads(line) for line in stream]
    prompts = prepare_prompts(raw, source, tokenizer)
    assert prompts.report.kept == rows
    assert prompts[0].prompt == raw[0][question] + "\nAnswer:"
    assert prompts[-1].row["prompt"] == raw[-1][question]


def test_dropped_prompts_of_gsm8k_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    source = DataSource(path=real("gsm8k/test.jsonl"), columns={"prompt": "question"})
    rows = read_source(source)
    # The tokenizer has one token per character, and the BOS token is one more.
    fit = [i for i, row in enumerate(rows) if len(row["question"]) + 1 <= 200]
    prompts = prepare_prompts(rows, source, tokenizer, max_prompt_tokens=200)
    assert 0 < len(fit) < 1319
    assert list(prompts.kept) == fit
    assert prompts.report.dropped_too_long == 1319 - len(fit)


@pytest.mark.parametrize("people", [3, 7])
def test_knights_and_knaves(people: int, tokenizer: PreTrainedTokenizerFast) -> None:
    source = DataSource(
        path=[real(f"knights_and_knaves/{people}ppl_{split}.parquet") for split in ("train", "test")],
        columns={"prompt": "quiz", "answer": "solution_text_format"},
    )
    prompts = prepare_prompts(read_source(source), source, tokenizer)
    assert len(prompts) == 1000
    assert prompts.rows.place(900) == f"{DATA}/knights_and_knaves/{people}ppl_test.parquet, row 1"
    for prompt in (prompts[0], prompts[999]):
        assert isinstance(prompt.prompt, str) and prompt.prompt.startswith("A very special island")
        names, solution = prompt.row["names"], prompt.row["solution"]
        assert len(names) == len(solution) == people
        roles = [
            f"({i}) {n} is a {'knight' if s else 'knave'}"
            for i, (n, s) in enumerate(zip(names, solution, strict=True), 1)
        ]
        assert prompt.row["answer"] == "\n".join(roles)


def test_the_messages_of_knights_and_knaves_load_unmapped(tokenizer: PreTrainedTokenizerFast) -> None:
    source = DataSource(path=real("knights_and_knaves/3ppl_test.parquet"), limit=3)
    prompts = prepare_prompts(read_source(source), source, tokenizer)
    message = prompts[0].prompt[0]
    assert isinstance(message, dict) and message["role"] == "user"
    assert tokenizer.decode(prompts[0].prompt_ids) == f"<s>[user]{message['content']}</s>[assistant]"


@pytest.mark.parametrize(
    ("config", "train", "val"), [("gsm8k", 7473, [200]), ("knights_and_knaves", 4500, [100, 100, 100])]
)
def test_data_of_the_recipes(
    config: str, train: int, val: list[int], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    real("gsm8k/train.jsonl")
    monkeypatch.setenv("DISTILLKIT_DATA", str(DATA))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PromptData, "data")
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["data"]
    data = parser.instantiate(parser.parse_object({"data": settings})).data
    data.max_prompt_tokens = None  # in characters, as this tokenizer counts, the recipes' limit would drop rows
    data.prepare(tokenizer)
    assert [report.kept for report in data.reports] == [train, *val]
    for prompts in (data.train_prompts, *data.val_prompts):
        assert prompts is not None and "{" not in str(prompts[0].prompt).replace("\\boxed{}", "")
