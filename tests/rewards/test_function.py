"""Plain functions as rewards, in TRL's convention."""

from __future__ import annotations

import functools
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillkit.errors import ConfigError, ContractError, ScoringError
from distillkit.rewards import as_reward
from distillkit.rewards.function import FunctionReward, TrainerState
from distillkit.rewards.length import LengthReward
from distillkit.types import CORRECT, UNKNOWN, WRONG, RewardOutput
from tests.rewards import trl_functions
from tests.rewards.batches import batch

HERE = "tests.rewards.trl_functions"
ROWS: list[dict[str, Any]] = [{"answer": "4", "task": "sum"}, {"answer": "7", "task": "word", "prompt": "x"}]
TEXTS = ["2 + 2 is 4", "six"]
IDS = [[5, 6, 7], [8]]
CHAT = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {i}"}] for i in range(2)]


def rewards_of(function: Any, *, prompts: Any = None, **arguments: Any) -> RewardOutput:
    reward = FunctionReward(function=function, **arguments) if isinstance(function, str) else as_reward(function)
    output = reward(batch(TEXTS, ROWS, prompts=prompts, completion_ids=IDS, version=5))
    reward.teardown()
    return output


def test_a_function_gets_trls_arguments_and_nothing_else() -> None:
    seen: dict[str, Any] = {}

    def record(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0, 0.0]

    rewards_of(record, prompts=["a?", "b?"])
    log_extra, log_metric = seen.pop("log_extra"), seen.pop("log_metric")
    assert callable(log_extra) and callable(log_metric)
    assert seen == {
        "prompts": ["a?", "b?"],
        "completions": TEXTS,
        "completion_ids": IDS,
        "answer": ["4", "7"],
        "task": ["sum", "word"],
        "trainer_state": TrainerState(global_step=5),
    }
    assert all(type(i) is int for ids in seen["completion_ids"] for i in ids)


def test_completions_are_messages_where_prompts_are() -> None:
    seen: dict[str, Any] = {}

    def record(prompts: Any, completions: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [0.0, 0.0]

    rewards_of(record, prompts=[tuple(CHAT[0]), "text"])
    assert seen["prompts"] == [CHAT[0], "text"]
    assert seen["completions"] == [[{"role": "assistant", "content": TEXTS[0]}], TEXTS[1]]


@pytest.mark.parametrize("prompts", [None, CHAT], ids=["text", "messages"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("correct_answer", [1.0, 0.0]),
        ("brevity", [-0.03, -0.01]),
        ("only_for_sums", [1.0, None]),
        ("never", [None, None]),
        ("with_extras", [5.0, 1.5]),
        ("has_plus", [1.0, 0.0]),
    ],
)
def test_functions_of_the_shared_file(name: str, values: list[float | None], prompts: Any) -> None:
    output = rewards_of(f"{HERE}.{name}", prompts=prompts, weight=0.5)
    expected = RewardOutput.single(name, values)
    assert output.names == (name,) and output.weights == (0.5,)
    assert torch.equal(output.values.nan_to_num(99.0), expected.values.nan_to_num(99.0))
    assert output.status == expected.status
    assert output.status[0] == tuple("not_applicable" if v is None else "scored" for v in values)
    assert output.correct.tolist() == [UNKNOWN, UNKNOWN]


def test_an_async_function_is_awaited_also_while_another_loop_runs() -> None:
    assert rewards_of(f"{HERE}.judged", prompts=["?", "long prompt"]).values[:, 0].tolist() == [0.5, 0.0]

    async def as_in_a_notebook() -> list[float]:
        return rewards_of(trl_functions.judged, prompts=["?", "long prompt"]).values[:, 0].tolist()

    import asyncio

    assert asyncio.run(as_in_a_notebook()) == [0.5, 0.0]


def test_all_calls_of_an_async_function_share_one_loop_which_teardown_ends() -> None:
    loops = []

    async def remember(completions: list[str]) -> list[float]:
        import asyncio

        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    reward = as_reward(remember)
    for _ in range(2):
        reward(batch(TEXTS, ROWS))
    assert loops[0] is loops[1]
    before = threading.active_count()
    reward.teardown()
    for thread in threading.enumerate():
        if thread.name == "reward-remember":
            thread.join(timeout=10)
    assert threading.active_count() == before - 1 and loops[0].is_closed()


def test_what_it_logs_is_kept() -> None:
    reward = as_reward(trl_functions.with_extras)
    assert isinstance(reward, FunctionReward)
    reward(batch(TEXTS, ROWS))
    assert (reward.logged_metrics, reward.logged_columns) == ({"mean_length": 6.5}, {"length": [10, 3]})


def test_keyword_arguments_come_from_the_config() -> None:
    def scaled(completions: list[str], factor: float, answer: str = "") -> list[float]:
        assert answer == "mine", "a keyword argument takes the place of a column"
        return [factor * len(text) for text in completions]

    reward = as_reward(scaled)
    assert isinstance(reward, FunctionReward)
    reward.kwargs = {"factor": 2.0, "answer": "mine"}
    assert reward(batch(TEXTS, ROWS)).values[:, 0].tolist() == [20.0, 6.0]


def test_correctness_is_known_only_where_a_bar_is_set() -> None:
    output = rewards_of(f"{HERE}.correct_answer", correct_above=0.5)
    assert output.correct.tolist() == [CORRECT, WRONG]
    assert rewards_of(f"{HERE}.only_for_sums", correct_above=0.5).correct.tolist() == [CORRECT, UNKNOWN]


@pytest.mark.parametrize(
    "returned", [[1, 0], (True, False), [np.float32(1.0), 0.0], np.array([1.0, 0.0]), torch.tensor([1.0, 0.0])]
)
def test_numbers_of_any_kind_are_taken(returned: Any) -> None:
    assert rewards_of(lambda completions: returned).values[:, 0].tolist() == [1.0, 0.0]


def test_nan_is_not_applicable_like_none() -> None:
    output = rewards_of(lambda completions: [math.nan, None])
    assert output.status == (("not_applicable", "not_applicable"),) and output.total.isnan().all()


WANTED = "2 finite numbers, or None, one per completion"


def broken(completions: list[str], returned: Any) -> Any:
    if isinstance(returned, Exception):
        raise returned
    return returned


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ContractError, f"returned\n    got:      1 values\n    expected: {WANTED}"),
        ([1.0] * 3, ContractError, f"returned\n    got:      3 values\n    expected: {WANTED}"),
        (1.0, ContractError, f"returned\n    got:      float\n    expected: a list of {WANTED}"),
        (None, ContractError, f"returned\n    got:      NoneType\n    expected: a list of {WANTED}"),
        ("ab", ContractError, f"returned\n    got:      str\n    expected: a list of {WANTED}"),
        ({"a": 1, "b": 2}, ContractError, f"returned\n    got:      dict\n    expected: a list of {WANTED}"),
        ([1.0, "x"], ContractError, f"returned\n    got:      'x' for completion 1\n    expected: {WANTED}"),
        ([[1.0], 0.0], ContractError, f"returned\n    got:      [1.0] for completion 0\n    expected: {WANTED}"),
        ([math.inf, 0.0], ContractError, f"returned\n    got:      inf for completion 0\n    expected: {WANTED}"),
        (
            KeyError("gold"),
            ScoringError,
            "raised\n    got:      KeyError: 'gold'\n"
            "    expected: 2 numbers, None for a rollout that it does not concern",
        ),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_what_breaks_the_convention_is_named(returned: Any, error: type[Exception], message: str) -> None:
    path = f"{__name__}.broken"
    with pytest.raises(error) as caught:
        rewards_of(path, kwargs={"returned": returned})
    assert str(caught.value) == f"reward function {path} {message}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "brevity",
            "model.rewards: function\n    got:      'brevity'\n    expected: a path: package.module.function",
        ),
        ("a b.c", "model.rewards: function\n    got:      'a b.c'\n    expected: a path: package.module.function"),
        (
            f"{HERE}.brevty",
            f"reward function {HERE}.brevty cannot be imported\n"
            f"    got:      AttributeError: module '{HERE}' has no attribute 'brevty'\n"
            "    expected: a function in an installed module, or in one on PYTHONPATH",
        ),
        (
            "no_such_module.fn",
            "reward function no_such_module.fn cannot be imported\n"
            "    got:      ModuleNotFoundError: No module named 'no_such_module'\n"
            "    expected: a function in an installed module, or in one on PYTHONPATH",
        ),
        (f"{HERE}.asyncio", f"reward function {HERE}.asyncio\n    got:      module\n    expected: something to call"),
    ],
)
def test_a_path_that_leads_to_no_function_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionReward(function=path).setup()
    assert str(caught.value) == message


def test_a_function_is_imported_at_setup_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    reward = FunctionReward(function="my_rewards.one")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward.setup()
    assert reward(batch(TEXTS, ROWS)).values[:, 0].tolist() == [1.0, 1.0]
    sys.modules.pop("my_rewards")


def test_anything_that_can_be_called_becomes_a_reward() -> None:
    length = LengthReward()
    assert as_reward(length) is length
    by_path = as_reward(f"{HERE}.brevity", weight=0.5)
    assert isinstance(by_path, FunctionReward) and (by_path.function, by_path.weight) == (f"{HERE}.brevity", 0.5)
    partial = as_reward(functools.partial(trl_functions.brevity, spare=1))
    assert isinstance(partial, FunctionReward) and partial.function == f"{HERE}.brevity"
    marker = as_reward(trl_functions.Marker("six"))
    assert isinstance(marker, FunctionReward) and marker.name == "Marker"
    assert marker(batch(TEXTS, ROWS)).values[:, 0].tolist() == [0.0, 1.0]
    for wrong in (7, LengthReward, None):
        with pytest.raises(ContractError, match="a reward component, a function, or the dotted path of a function"):
            as_reward(wrong)  # type: ignore[arg-type]


def test_several_with_weights_sum_over_those_that_apply() -> None:
    outputs = [
        rewards_of(f"{HERE}.{name}", weight=weight)
        for name, weight in (("correct_answer", 1.0), ("brevity", 2.0), ("only_for_sums", 0.25))
    ]
    merged = RewardOutput.merge(outputs)
    assert merged.names == ("correct_answer", "brevity", "only_for_sums")
    assert merged.total.tolist() == pytest.approx([1.0 - 0.06 + 0.25, -0.02])
    assert RewardOutput.merge([rewards_of(f"{HERE}.never")]).total.isnan().all()
