"""What the screen says: sentences for every combination of parts, rollouts that cannot harm a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from distillkit.reporting.metrics import MetricSummary
from distillkit.reporting.screen import (
    RowFacts,
    RunFacts,
    ScorerFacts,
    TermFacts,
    duration,
    last_line,
    printable,
    reward_words,
    shorten,
    show_rollouts,
    show_start,
    step_sentence,
)
from distillkit.types import RewardOutput, RolloutBatch, SamplingSettings, StepOutput
from tests.reporting.conftest import NAN, Step

FACTS = RunFacts(
    sampler="hf",
    settings=SamplingSettings(group_size=8, max_new_tokens=48),
    prompts_per_step=16,
    rewards=[("answer", 1.0)],
    teacher=ScorerFacts(name="local", source="embedded:teacher", parameters=790_000),
    objective="grpo",
    objective_settings="token mean, clip 0.2/0.2",
    divergence=TermFacts(name="k2", weight="0.2 (linear)"),
    student="embedded:student",
    student_parameters=330_000,
    device="cpu",
    precision="32-true",
    run_folder="runs/quickstart",
)
DRAWS = "Each step draws 16 prompts x 8 rollouts (up to 48 tokens, temperature 1) with hf"
SCORED = f"{DRAWS}, scores them with answer"
TAUGHT = f"{SCORED}, lets the local teacher embedded:teacher score the same tokens"
GRPO = "grpo (token mean, clip 0.2/0.2)"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, f"{TAUGHT}, and minimises {GRPO} + 0.2 (linear) * k2(student, teacher) as a loss."),
        (
            {"distill_through": "advantage", "divergence": TermFacts(name="k1", weight="0.1")},
            f"{TAUGHT}, and minimises {GRPO} with - 0.1 * k1(student, teacher) added to each token's advantage.",
        ),
        (
            {"distill_through": "reward", "divergence": TermFacts(name="k1", weight="0.1")},
            f"{TAUGHT}, and minimises {GRPO} with - 0.1 * k1(student, teacher) added to each rollout's reward.",
        ),
        # GRPO alone
        ({"teacher": None, "divergence": None}, f"{SCORED}, and minimises {GRPO}."),
        # RLAD: the teacher is in the ratio
        (
            {"objective": "trrd", "objective_settings": "alpha 0.5, clamp 5", "divergence": None},
            f"{TAUGHT}, and minimises trrd (alpha 0.5, clamp 5).",
        ),
        # distillation alone
        (
            {"rewards": [], "objective": None, "divergence": TermFacts(name="k2", weight="1")},
            f"{DRAWS}, lets the local teacher embedded:teacher score the same tokens, "
            "and minimises 1 * k2(student, teacher) as a loss.",
        ),
        (
            {"rewards": [], "objective": None, "distill_through": "advantage"},
            f"{DRAWS}, lets the local teacher embedded:teacher score the same tokens, "
            "and takes - 0.2 (linear) * k2(student, teacher) as each token's advantage.",
        ),
        # no teacher and no reward: only the objective is left
        ({"rewards": [], "teacher": None, "divergence": None}, f"{DRAWS} and minimises {GRPO}."),
        (
            {"rewards": [], "teacher": None, "divergence": None, "objective": None},
            f"{DRAWS} and updates nothing (no objective, no divergence).",
        ),
        # a reference, without and with a term of its own
        (
            {"reference": ScorerFacts(name="adapter_off")},
            f"{SCORED}, lets the local teacher embedded:teacher and the adapter_off reference score the same tokens, "
            f"and minimises {GRPO} + 0.2 (linear) * k2(student, teacher) as a loss.",
        ),
        (
            {
                "reference": ScorerFacts(name="local", source="base"),
                "reference_divergence": TermFacts(name="k3", weight="0.01"),
            },
            f"{SCORED}, lets the local teacher embedded:teacher and the local reference base score the same tokens, "
            f"and minimises {GRPO} + 0.2 (linear) * k2(student, teacher) + 0.01 * k3(student, reference) as losses.",
        ),
        (
            {
                "teacher": None,
                "divergence": None,
                "reference": ScorerFacts(name="local", source="base"),
                "reference_divergence": TermFacts(name="k3", weight="0.01"),
            },
            f"{SCORED}, lets the local reference base score the same tokens, "
            f"and minimises {GRPO} + 0.01 * k3(student, reference) as a loss.",
        ),
        (
            {
                "distill_through": "advantage",
                "reference": ScorerFacts(name="local", source="base"),
                "reference_divergence": TermFacts(name="k3", weight="0.01"),
            },
            f"{SCORED}, lets the local teacher embedded:teacher and the local reference base score the same tokens, "
            f"and minimises {GRPO} + 0.01 * k3(student, reference) as a loss "
            "with - 0.2 (linear) * k2(student, teacher) added to each token's advantage.",
        ),
        (
            {"masker": "response_level", "objective_settings": None},
            f"{TAUGHT}, lets response_level choose which tokens count, "
            "and minimises grpo + 0.2 (linear) * k2(student, teacher) as a loss.",
        ),
        (
            {"rewards": [("math_verify", 1.0), ("format", 0.5), ("length", -0.1)], "teacher": None, "divergence": None},
            f"{DRAWS}, scores them with math_verify, format (weight 0.5), and length (weight -0.1), "
            f"and minimises {GRPO}.",
        ),
        (
            {
                "sampler": "replay",
                "settings": SamplingSettings(group_size=1, max_new_tokens=1, temperature=0.0, top_p=0.9),
                "prompts_per_step": 1,
                "rewards": [("answer", 1.0), ("format", 2.0)],
            },
            "Each step draws 1 prompt x 1 rollout (up to 1 token, greedy, top-p 0.9) with replay, "
            "scores them with answer and format (weight 2), "
            "lets the local teacher embedded:teacher score the same tokens, "
            f"and minimises {GRPO} + 0.2 (linear) * k2(student, teacher) as a loss.",
        ),
    ],
)
def test_the_sentence_of_every_combination(change: dict[str, Any], sentence: str) -> None:
    assert step_sentence(replace(FACTS, **change)) == sentence


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=40), out


def test_the_start_says_rows_tokens_models_and_folder() -> None:
    facts = replace(
        FACTS,
        rows=[
            RowFacts(source="train.jsonl", kept=7000, dropped={"prompt too long": 1470, "empty": 0, "no answer": 3}),
            RowFacts(source="held_out", kept=500),
        ],
        max_prompt_tokens=12,
        max_steps=300,
        reference=ScorerFacts(name="adapter_off"),
        device="cuda:0",
        precision="bf16-mixed",
        student_parameters=7_615_616_512,
        run_folder="runs/[bold]x",
    )
    console, out = plain_console()
    show_start(facts, console)
    assert out.getvalue() == (
        step_sentence(facts) + "\n"
        "Rows: train.jsonl 7,000 kept, 1,473 dropped (1,470 prompt too long, 3 no answer)\n"
        "Rows: held_out 500 kept, none dropped\n"
        "At most 6,144 sampled tokens per step after prompts of up to 12; 300 steps in all.\n"
        "Models: student embedded:student (7.62 B parameters), teacher embedded:teacher (0.79 M parameters), "
        "reference adapter_off; on cuda:0, precision bf16-mixed.\n"
        "Everything is written to runs/[bold]x.\n"
    )


def test_the_start_of_a_run_without_a_teacher() -> None:
    facts = replace(FACTS, teacher=None, divergence=None, student_parameters=4_321)
    console, out = plain_console()
    show_start(facts, console)
    assert out.getvalue() == (
        f"{SCORED}, and minimises {GRPO}.\nAt most 6,144 sampled tokens per step.\n"
        "Models: student embedded:student (4,321 parameters); on cpu, precision 32-true.\n"
        "Everything is written to runs/quickstart.\n"
    )


def test_two_rollouts_one_right_one_wrong(step: Step) -> None:
    console, out = plain_console()
    show_rollouts(step.output, step.tokenizer, console)
    assert out.getvalue() == (
        "2 rollouts of group 10, this step:\n"
        "    prompt  3+4>\n"
        "  reward 1.05 (answer 1, format 0.5), right, stop, 2 tokens\n"
        "    text    7<eos>\n"
        "  reward 0 (answer 0, format not scored), wrong, length, 2 tokens\n"
        "    text    12\n"
    )


def _rewards(correct: list[int], values: list[float]) -> RewardOutput:
    return RewardOutput(
        names=("answer",),
        values=torch.tensor(values)[:, None],
        weights=(1.0,),
        status=(tuple("crashed" if v != v else "scored" for v in values),),
        correct=torch.tensor(correct, dtype=torch.int8),
        answers=(None,) * len(values),
    )


@pytest.mark.parametrize(
    ("correct", "values", "shown"),
    [
        ([0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0.5], ["d", "e"]),  # the first group has no right one
        ([0, 0, 0, 0, 0, 0], [0.1, 0.3, 0.2, 0, 0, 0], ["b", "a"]),  # no group has: best and worst of the first
        ([-1, -1, -1, -1, -1, -1], [NAN, 0.3, 0.2, 0, 0, 0], ["b", "c"]),  # "not scored" is no worst
        ([1, 1, 0, 1, 0, 1], [1, 2, 3, 0, 0, 0], ["b", "c"]),  # right before a higher reward
        ([-1, -1, -1, -1, -1, -1], [NAN] * 6, ["a", "b"]),
    ],
)
def test_which_rollouts_are_shown(
    make_batch: Callable[..., RolloutBatch],
    tokenizer: PreTrainedTokenizerFast,
    correct: list[int],
    values: list[float],
    shown: list[str],
) -> None:
    batch = make_batch(("1>", ["a", "b", "c"]), ("2>", ["d", "e", "f"]))
    console, out = plain_console()
    show_rollouts(StepOutput(rollouts=batch, rewards=_rewards(correct, values), metrics={}), tokenizer, console)
    assert [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("    text")] == shown


def test_rollouts_without_rewards_and_of_any_count(
    make_batch: Callable[..., RolloutBatch], tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = make_batch(("1>", ["a", "b<eos>", "c"]))
    output = StepOutput(rollouts=batch, rewards=None, metrics={})
    for count, texts in ((0, []), (1, ["a"]), (5, ["a", "b<eos>", "c"])):
        console, out = plain_console()
        show_rollouts(output, tokenizer, console, count=count)
        lines = out.getvalue().splitlines()
        assert [line.removeprefix("    text    ") for line in lines if line.startswith("    text")] == texts
        assert ("  length, 1 token" in lines) == (count > 0)


def test_texts_cannot_be_taken_for_markup_or_control_codes(
    make_batch: Callable[..., RolloutBatch], tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = make_batch(("[red]1[/red]\n2>", ["[/bold][link=x]" + "y" * 50 + "\nend<eos>"]))
    output = StepOutput(rollouts=batch, rewards=None, metrics={})
    console, out = plain_console()
    show_rollouts(output, tokenizer, console, limit=40)
    assert out.getvalue() == (
        "1 rollout of group 10, this step:\n"
        "    prompt  [red]1[/red]\n"
        "            2>\n"
        "  stop, 70 tokens\n"
        "    text    [/bold][link=x]yyyyy [... 34 characters ...] yyyyyyyyyyy\n"
        "            end<eos>\n"
    )


def test_a_terminal_gets_colours_and_wrapped_lines(step: Step) -> None:
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, color_system="standard")
    show_start(FACTS, console)
    show_rollouts(step.output, step.tokenizer, console)
    assert "\x1b[32m" in out.getvalue() and "\x1b[31m" in out.getvalue()
    assert max(len(line) for line in Text.from_ansi(out.getvalue()).plain.split("\n")) <= 40


def test_printable_escapes_what_moves_the_cursor_or_hides_text() -> None:
    assert printable("a\x1b[2J\r\b\x00\x7f\x9b\u202e\u2028\ud800é漢\t\n👍🏽") == (
        "a\\x1b[2J\\r\\x08\\x00\\x7f\\x9b\\u202e\\u2028\\ud800é漢\\t\n👍🏽"
    )


def test_shorten() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("a" * 3000 + "b" * 3000, 4) == "aa [... 5,996 characters ...] bb"


@pytest.mark.parametrize(
    ("total", "values", "correct", "words"),
    [
        (1.0, {"answer": 1.0}, True, ["reward 1 (answer 1)", "right"]),
        (0.1234, {"a": 0.1, "b": None}, False, ["reward 0.123 (a 0.1, b not scored)", "wrong"]),
        (NAN, {"a": NAN}, None, ["reward not scored (a not scored)"]),
        (None, {}, None, []),
    ],
)
def test_reward_words(total: float, values: dict[str, float], correct: bool | None, words: list[str]) -> None:
    assert reward_words(total, values, correct) == words


SUMMARY = MetricSummary(
    name="val/held_out/pass@1", first=0.43, first_step=0, last=0.79, last_step=320, best=0.804, best_step=300
)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"summary": SUMMARY, "student_folder": "runs/quickstart/student"},
            "Done: val/held_out/pass@1 0.430 -> 0.790 (best 0.804 at step 300) in 2 min 31 s; "
            "student in runs/quickstart/student, everything else in runs/quickstart",
        ),
        ({}, "Done: 320 steps in 2 min 31 s; everything in runs/quickstart"),
        ({"steps": 1, "seconds": 0.4}, "Done: 1 step in 0 s; everything in runs/quickstart"),
        (
            {"summary": replace(SUMMARY, last=0.43, last_step=0, best=0.43, best_step=0)},
            "Done: val/held_out/pass@1 0.430 in 2 min 31 s; everything in runs/quickstart",
        ),
        (
            {"summary": replace(SUMMARY, best=0.43, best_step=0, last=0.4)},
            "Done: val/held_out/pass@1 0.430 -> 0.400 (best 0.430 at step 0) in 2 min 31 s; "
            "everything in runs/quickstart",
        ),
        (
            {"stopped": "interrupted", "steps": 40, "summary": SUMMARY},
            "Stopped at step 40 (interrupted): val/held_out/pass@1 0.430 -> 0.790 (best 0.804 at step 300) "
            "in 2 min 31 s; everything in runs/quickstart",
        ),
    ],
)
def test_the_last_line(arguments: dict[str, Any], line: str) -> None:
    assert last_line(**{"run_folder": "runs/quickstart", "seconds": 151, "steps": 320, **arguments}) == line


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.4, 59.6, 60, 3599.6, 7322, 360000)] == [
        "0 s", "59 s", "1 min 00 s", "1 min 00 s", "1 h 00 min", "2 h 02 min", "100 h 00 min",
    ]  # fmt: skip
