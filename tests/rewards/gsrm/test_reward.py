"""The structure reward: values by hand, and everything that is not a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.components import RewardFn
from distillkit.decomposition import Decomposition, DecompositionError, ReasoningStep, parse, render
from distillkit.embedded.arithmetic import check_chain
from distillkit.errors import ConfigError, DataError, ScoringError
from distillkit.meters import Meters, reward_meters
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided
from distillkit.rewards.gsrm.judge import StepJudge, StepPair
from distillkit.rewards.gsrm.local import LocalDecomposer
from distillkit.rewards.gsrm.reward import StructureReward
from distillkit.rewards.gsrm.server import ServerDecomposer
from distillkit.rewards.gsrm.server_judge import ServerJudge
from distillkit.testing import check_reward, rollout_batch, student_info
from distillkit.types import NOT_A_SCORE, UNKNOWN, RewardOutput, RolloutBatch
from tests.rewards.batches import batch
from tests.rewards.gsrm import markov
from tests.rewards.gsrm.chat_server import Answer, chat_server, nobody, says


class Letters(Decomposer):
    """A trace `mqa nrb` is two steps of three letters each; `!` cannot be taken apart, and `down` not now."""

    def __init__(self) -> None:
        self.asked: list[Item] = []
        self.calls = 0
        self.open = False

    def setup(self, device: torch.device) -> None:
        self.open = True

    def teardown(self) -> None:
        self.open = False

    def identity(self) -> str:
        return "letters"

    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        self.calls += 1
        self.asked += items
        return [self._one(trace) for _, trace in items]

    def _one(self, trace: str) -> Decomposition | Undecided:
        if trace == "down":
            return Undecided(reason="busy", lasting=False)
        if "!" in trace:
            return Undecided(reason="not a decomposition", detail="!")
        return Decomposition(steps=tuple(ReasoningStep(meta=s[0], question=s[1], answer=s[2]) for s in trace.split()))


class Scripted(StepJudge):
    """The exact judge, but `?` is neither; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[StepPair] = []
        self.calls = 0

    def agree(self, pairs: Sequence[StepPair]) -> list[bool | None]:
        self.calls += 1
        self.asked += pairs
        return [None if "?" in (p.ours, p.theirs) else p.ours == p.theirs for p in pairs]


def reward(**options: Any) -> StructureReward:
    made = StructureReward(**{"decomposer": Letters(), "judge": Scripted(), **options})
    made.setup(student_info())
    return made


def outcome(made: RewardFn, texts: Sequence[str], trace: Any, **options: Any) -> tuple[list[float | None], list[str]]:
    rows = [trace if isinstance(trace, Mapping) else {"teacher_trace": trace}] * len(texts)
    output = made(batch(texts, rows, **options))
    assert output.names == ("gsrm",) and set(output.correct.tolist()) <= {UNKNOWN}
    values = [None if math.isnan(v) else v for v in output.values[:, 0].tolist()]
    return values, list(output.status[0])


TEACHER = "mqa nrb osc ptd"
STUDENTS = {
    "mqa nrb osc ptd": (4.0, 1.0, 4, 4),  # value, value / N_t, N_s, N_t
    "mqa nrb": (2.0, 0.5, 2, 4),
    "mqa nrb osc ptd ues": (4.0, 1.0, 5, 4),
    "mxa nrb": (1.5, 0.375, 2, 4),
    "mqx nrb": (1.5, 0.375, 2, 4),
    "mxy nrb": (1.25, 0.3125, 2, 4),
    "mqa zrb osc ptd": (1.0, 0.25, 4, 4),  # another branch at step 2 ends it
    "zqa nrb osc": (0.0, 0.0, 3, 4),
    "nrb osc ptd": (0.0, 0.0, 3, 4),  # the right steps one place too early
}


@pytest.mark.parametrize("coverage_weight", [0.0, 0.4])
def test_values_by_hand(coverage_weight: float) -> None:
    for normalize in ("none", "teacher_steps"):
        made = reward(normalize=normalize, coverage_weight=coverage_weight)
        values, status = outcome(made, list(STUDENTS), TEACHER)
        share = [min(1.0, ours / theirs) for _, _, ours, theirs in STUDENTS.values()]
        base = [(raw, part)[normalize == "teacher_steps"] for raw, part, _, _ in STUDENTS.values()]
        assert values == pytest.approx([b + coverage_weight * s for b, s in zip(base, share, strict=True)])
        assert status == ["scored"] * len(STUDENTS)


def test_the_defaults_are_the_released_codes_sum_and_the_exact_judge() -> None:
    made = StructureReward(decomposer=Letters())
    made.setup(student_info())
    assert outcome(made, ["mqa nrb"], "MQA  NRB") == ([2.0], ["scored"])
    assert made.weight == 1.0


def test_what_cannot_be_told_is_not_scored_and_never_zero(caplog: pytest.LogCaptureFixture) -> None:
    made = reward()
    texts = ["mqa", "m!a", "?qa", "m?a", "mq?", "down", "zqa", ""]
    values, status = outcome(made, texts, TEACHER)
    assert values == [1.0, None, None, None, None, None, 0.0, 0.0]
    assert status == ["scored", *["undecided"] * 5, "scored", "unparseable"]
    said = [record.getMessage() for record in caplog.records]
    end = "; the rollout is not scored, and counted. Said once for each kind"
    assert said == [
        f"gsrm: a student's trace: not a decomposition (!){end}",
        f"gsrm: a student's trace: busy{end}",
        f"gsrm: the judge: neither yes nor no{end}",
    ]
    outcome(made, texts, TEACHER)
    assert len(caplog.records) == 3


@pytest.mark.parametrize("trace", ["!", "down", "   ", "</think>4", None, 7])
def test_a_teachers_trace_that_cannot_be_used_scores_none_of_its_rollouts(trace: Any) -> None:
    values, status = outcome(reward(), ["mqa", "nrb", ""], trace)
    decided = isinstance(trace, str) and trace in ("!", "down")
    assert values == [None, None, 0.0 if decided else None]
    assert status == ["undecided", "undecided", "unparseable" if decided else "undecided"]


def test_undecided_rollouts_leave_their_group_whatever_the_other_rewards_say() -> None:
    assert "undecided" in NOT_A_SCORE
    made = reward(weight=0.5)
    texts = ["mqa", "m!a", "zqa"]
    structure = made(batch(texts, [{"teacher_trace": TEACHER}] * 3))
    whole = RewardOutput.merge([RewardOutput.single("answer", [1.0, 1.0, 0.0]), structure])
    assert [None if math.isnan(v) else v for v in whole.total.tolist()] == [1.5, None, 0.0]
    meters = Meters()
    reward_meters(meters, whole)
    counted = meters.local()
    assert counted["train/undecided/gsrm"] == 1 and counted["train/unscored"] == 1
    assert counted["train/undecided/answer"] == 0 and counted["train/reward/gsrm"] == 0.5


def test_equal_traces_and_pairs_are_asked_for_once() -> None:
    decomposer, judge = Letters(), Scripted()
    made = reward(decomposer=decomposer, judge=judge)
    texts = ["mqa nrb"] * 5 + ["mqa nrx"] * 3 + ["mqa nrb"]
    first = outcome(made, texts, TEACHER)
    assert first[0] == [2.0] * 5 + [1.5] * 3 + [2.0]
    assert [trace for _, trace in decomposer.asked] == [TEACHER, "mqa nrb", "mqa nrx"] and decomposer.calls == 1
    kinds = [(p.kind, p.ours, p.theirs) for p in judge.asked]
    assert sorted(set(kinds)) == sorted(kinds) and len(kinds) == 7
    assert judge.calls == 4  # two steps, two calls each
    assert outcome(made, texts, TEACHER) == first
    assert (decomposer.calls, judge.calls) == (1, 4)
    assert outcome(made, texts, "mqa zzz")[0] == [1.0] * 9
    assert decomposer.calls == 2 and decomposer.asked[-1] == ("?", "mqa zzz")


def test_an_open_verdict_is_asked_again() -> None:
    judge = Scripted()
    made = reward(judge=judge)
    for _ in range(2):
        assert outcome(made, ["?qa"], TEACHER) == ([None], ["undecided"])
    assert judge.calls == 2


def test_only_the_thoughts_of_both_are_taken_apart() -> None:
    decomposer = Letters()
    made = reward(decomposer=decomposer)
    texts = ["<think>\nmqa nrb</think> The answer is !", "mqa nrb</think>b", "mqa nrb", "</think>b"]
    values, status = outcome(made, texts, "<think>mqa nrb\n</think>\n\n!")
    assert values == [2.0, 2.0, 2.0, 0.0] and status == [*["scored"] * 3, "unparseable"]
    assert decomposer.asked == [("?", "mqa nrb")]
    whole = reward(think_end=None)
    assert outcome(whole, ["mqa nrb", "mqa </think>"], "mqa nrb") == ([2.0, 1.0], ["scored"] * 2)


def test_the_problem_is_the_prompt_or_a_column() -> None:
    decomposer, judge = Letters(), Scripted()
    made = reward(decomposer=decomposer, judge=judge)
    prompts = [[{"role": "system", "content": "Think."}, {"role": "user", "content": "why?"}]]
    outcome(made, ["mqa"], "mqb", prompts=prompts)
    assert decomposer.asked == [("why?", "mqb"), ("why?", "mqa")] and judge.asked[0].problem == "why?"
    named = reward(decomposer=decomposer, problem="question")
    outcome(named, ["mqa"], {"teacher_trace": "mqb", "question": 12})
    assert decomposer.asked[2:] == [("12", "mqb"), ("12", "mqa")]
    with pytest.raises(DataError) as caught:
        outcome(named, ["mqa"], {"teacher_trace": "mqb"})
    assert str(caught.value) == (
        "reward gsrm: the data has no column 'question'\n    got:      teacher_trace\n"
        "    expected: a column with the reference, named 'question' or by the reward's argument"
    )


def test_rows_without_a_trace_are_named_at_the_start() -> None:
    rows = [
        {"teacher_trace": "mqa"},
        {"teacher_trace": ""},
        {"teacher_trace": "  \n"},
        {"teacher_trace": None},
        {"teacher_trace": ["mqa"]},
        {"teacher_trace": "<think></think>4"},
        {},
    ]
    empty, absent = (
        "the teacher trace in 'teacher_trace' is empty",
        "no column 'teacher_trace' (gsrm.trace names it; gsrm.without_trace: skip goes without)",
    )
    no_text = "the teacher trace in 'teacher_trace' is a list, not text"
    made = StructureReward(decomposer=Letters())
    assert made.check_rows(rows) == [(1, empty), (2, empty), (3, empty), (4, no_text), (5, empty), (6, absent)]
    assert StructureReward(decomposer=Letters(), without_trace="skip").check_rows(rows) == [(4, no_text)]
    assert StructureReward(decomposer=Letters(), trace="chain").check_rows([{"chain": "mqa"}]) == []


def test_rows_without_a_trace_are_undecided() -> None:
    for made in (reward(), reward(without_trace="undecided")):
        for row in ({"teacher_trace": None}, {"teacher_trace": " "}):
            assert outcome(made, ["mqa", ""], row) == ([None, None], ["undecided"] * 2)


def test_rows_without_a_trace_may_skip_the_reward() -> None:
    made = reward(without_trace="skip")
    for row in ({}, {"teacher_trace": None}, {"teacher_trace": " "}):
        assert outcome(made, ["mqa", ""], row) == ([None, None], ["not_applicable"] * 2)
    with pytest.raises(DataError) as caught:
        outcome(reward(), ["mqa"], {"chain": "x"})
    assert str(caught.value).split("\n")[0] == "reward gsrm: the data has no column 'teacher_trace'"


def test_teacher_traces_are_kept_on_disk_for_the_next_run(tmp_path: Path) -> None:
    first = Letters()
    outcome(reward(decomposer=first, cache_dir=str(tmp_path / "kept")), ["mqa"], TEACHER)
    second = Letters()
    assert outcome(reward(decomposer=second, cache_dir=str(tmp_path / "kept")), ["mqa"], TEACHER)[0] == [1.0]
    assert (len(first.asked), second.asked) == (2, [("?", "mqa")])


def test_models_are_opened_and_closed_with_the_reward() -> None:
    decomposer = Letters()
    made = StructureReward(decomposer=decomposer)
    with pytest.raises(ScoringError) as caught:
        outcome(made, ["mqa"], TEACHER)
    assert str(caught.value) == "StructureReward\n    got:      called before setup\n    try:      call setup first"
    made.setup(student_info())
    assert decomposer.open
    made.teardown()
    assert not decomposer.open


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"normalize": "steps"}, "normalize\n    got:      'steps'\n    expected: none or teacher_steps"),
        ({"without_trace": "drop"}, "without_trace\n    got:      'drop'\n    expected: undecided or skip"),
        ({"coverage_weight": -0.1}, "coverage_weight\n    got:      -0.1\n    expected: at least 0"),
        ({"think_end": ""}, "think_end\n    got:      ''\n    expected: text, such as </think>, or null"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StructureReward(decomposer=Letters(), **arguments)
    assert str(caught.value) == f"model.rewards: gsrm.{text}"


def arithmetic(problem: str, trace: str) -> str:
    """What a perfect decomposer writes about a chain of the embedded task."""
    done = check_chain(problem, trace).steps
    return "\n".join(
        [
            f"Step {i}\nMeta-reasoning: operator {s.index}\nSub-problem: {s.question or '?'}\nAnswer: {s.value or '?'}"
            for i, s in enumerate(done, start=1)
        ]
        + ["Final answer: ?"]
    )


def test_a_served_decomposer_and_a_served_judge_together() -> None:
    """3*2+4*5: the teacher takes 4*5 first. By hand: equal 3; a wrong last digit 2.5; the other order 0."""

    def answers(body: Any, number: int) -> Answer:
        words = body["messages"][-1]["content"]
        if body["max_tokens"] == 1:
            return says("Yes")
        if body["model"] == "judge":
            ours, theirs = (words.split(f"{who} solution, ")[1].split("\n")[1] for who in ("First", "Second"))
            return says("Yes." if ours == theirs else "no")
        problem, trace = words.removeprefix("Problem:\n").split("\n\nReasoning:\n")
        return says("I cannot do that" if trace == "9" else arithmetic(problem, trace))

    rows = [{"teacher_trace": "3*2+0>6+0>6"}] * 4
    texts = ["3*2+0>6+0>6", "3*2+0>6+0>7", "6+4*5>6+0>6", "9"]
    with chat_server(answers) as server:
        made = StructureReward(
            decomposer=ServerDecomposer(base_url=server.url, model="gsrm"),
            judge=ServerJudge(base_url=server.url, model="judge"),
        )
        made.setup(student_info())
        output = made(batch(texts, rows, prompts=["3*2+4*5>"] * 4))
        made.teardown()
    values = [None if math.isnan(v) else v for v in output.values[:, 0].tolist()]
    assert values == [3.0, 2.5, 0.0, None]
    assert output.status == (("scored", "scored", "scored", "undecided"),)
    # One probe each. Equal texts need no judge: one meta and one answer differ.
    assert [asked.body["model"] for asked in server.asked if asked.body["max_tokens"] == 1] == ["gsrm", "judge"]
    assert sum(asked.body["model"] == "judge" for asked in server.asked) == 1 + 2


def test_servers_that_cannot_be_used_are_refused_at_setup() -> None:
    def answers(body: Any, number: int) -> Answer:
        return Answer("no such model", status=404) if body["model"] == "wrong" else says("yes")

    with chat_server(answers) as server:
        right, wrong = ({"base_url": server.url, "model": model} for model in ("right", "wrong"))
        for made, argument in (
            (StructureReward(decomposer=ServerDecomposer(**wrong)), "decomposer.model"),
            (StructureReward(decomposer=ServerDecomposer(**right), judge=ServerJudge(**wrong)), "judge.model"),
            (StructureReward(decomposer=Letters(), judge=ServerJudge(**wrong)), "judge.model"),
            (StructureReward(decomposer=ServerDecomposer(base_url=nobody(), model="m")), "decomposer.base_url"),
        ):
            with pytest.raises(ConfigError) as caught:
                made.setup(student_info())
            made.teardown()
            assert str(caught.value).startswith(f"model.rewards: gsrm.{argument}: the server cannot be used\n")
    assert [asked.body["model"] for asked in server.asked] == ["wrong", "right", "wrong", "wrong"]


def rollouts() -> RolloutBatch:
    groups = {"p1": ["xa", "ya", "xb", "?"], "p2": ["b", "a", "+", ""]}
    return rollout_batch(groups, rows=[{"teacher_trace": "ta"}, {"teacher_trace": "tb"}])


def local_decomposer(folder: Path) -> LocalDecomposer:
    replies = {
        "a": "Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: 1\nFinal answer: 1",
        "b": "Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: 2\nFinal answer: 2",
        "?": "Well.",
        "+": "Step 1\nMeta-reasoning: n\nSub-problem: q\nAnswer: 2\nFinal answer: 2",
    }
    return LocalDecomposer(path=markov.decomposer(folder, replies), max_new_tokens=8)


def test_the_reward_keeps_its_contract_with_a_local_decomposer(tmp_path: Path) -> None:
    made = StructureReward(decomposer=local_decomposer(tmp_path), weight=2.0, coverage_weight=0.25)
    check_reward(made, rollouts=rollouts())
    made.setup(student_info())
    output = made(rollouts())
    values = [None if math.isnan(v) else v for v in output.values[:, 0].tolist()]
    assert values == [1.25, 1.25, 0.75, None, 1.25, 0.75, 0.25, 0.0]
    assert output.status[0] == (*["scored"] * 3, "undecided", *["scored"] * 3, "unparseable")


def test_the_labels_the_reward_reads_are_those_a_decomposer_is_trained_to_write() -> None:
    """A decomposer that follows its targets to the letter is scored, one that renames a label never silently is 0."""
    target = render(parse(arithmetic("3*2+4*5>", "3*2+0>6+0>6")))
    drifted = target.replace("Sub-problem:", "Query:")
    with pytest.raises(DecompositionError):
        parse(drifted)
    for reply, expected in ((target, ([3.0], ["scored"])), (drifted, ([None], ["undecided"]))):
        with chat_server([says(reply)]) as server:
            made = StructureReward(decomposer=ServerDecomposer(base_url=server.url, model="gsrm"))
            made.setup(student_info())
            assert outcome(made, ["a chain"], "3*2+0>6+0>6") == expected
            made.teardown()
