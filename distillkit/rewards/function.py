"""A plain Python function as a reward, in TRL's convention."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distillkit.components import RewardFn, StudentInfo
from distillkit.errors import ConfigError, ContractError, DistillkitError, ScoringError, problem
from distillkit.types import RewardOutput, RolloutBatch

__all__ = ["FunctionReward", "TrainerState", "as_reward"]

_OWN_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a function may ask of the run: `global_step`, the optimizer updates made when the rollouts were drawn."""

    global_step: int


class FunctionReward(RewardFn):
    """A reward written as a function, called the way TRL's `GRPOTrainer` calls one.

    The function gets keyword arguments: `prompts` and `completions`, N of each (text; where the prompt is a list of
    messages, the completion is `[{"role": "assistant", "content": text}]`), `completion_ids`, N lists of int, and every
    column of the dataset as a list of N. Also, where it accepts them: `trainer_state` (a `TrainerState`),
    `log_extra(column, values)` and `log_metric(name, value)`. Arguments it does not accept are not passed. It returns N
    numbers; None or NaN is "does not apply to this rollout", which is left out of the sum. It may be `async`; all calls
    share one event loop.

    It runs in this process, without a deadline: work that could hang belongs in a `VerifierPool`.

    See *GRPO Trainer: Using a custom reward function*, TRL 1.16, 2026, https://huggingface.co/docs/trl/grpo_trainer.

    Args:
        function: dotted path of the function, `package.module.function`.
        kwargs: further keyword arguments; one with the name of a column takes its place.
        correct_above: a value above it says that the completion is right, another that it is wrong; None: the function
            says nothing about correctness (metrics and maskers then see "unknown").
        weight: factor on this reward in the total.

    Raises:
        ConfigError: `function` is not a dotted path, or (at `setup`) cannot be imported or called.
        ContractError: it returned something else than N numbers.
        ScoringError: it raised.

    Example:
        >>> FunctionReward(function="trl.rewards.think_format_reward", weight=0.5).name
        'think_format_reward'
    """

    def __init__(
        self,
        *,
        function: str,
        kwargs: dict[str, Any] | None = None,
        correct_above: float | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if not all(part.isidentifier() for part in function.split(".")) or "." not in function:
            raise ConfigError(
                problem("model.rewards: function", got=repr(function), expected="a path: package.module.function")
            )
        self.function = function
        self.kwargs = dict(kwargs or {})
        self.correct_above = correct_above
        self.logged_metrics: dict[str, float] = {}
        """What the function passed to `log_metric` in the last call: name to mean."""
        self.logged_columns: dict[str, list[Any]] = {}
        """What the function passed to `log_extra` in the last call: column to N values."""
        self._callable: Callable[..., Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @staticmethod
    def of(function: Callable[..., Any], *, correct_above: float | None = None, weight: float = 1.0) -> FunctionReward:
        """Return the reward of a function at hand, a `functools.partial` or an object with `__call__`."""
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        name = (
            getattr(inner, "__qualname__", type(inner).__qualname__).replace("<locals>.", "").replace("<lambda>", "_")
        )
        module = getattr(inner, "__module__", None) or "__main__"
        reward = FunctionReward(function=f"{module}.{name}", correct_above=correct_above, weight=weight)
        reward._callable = function
        return reward

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.function.rpartition(".")[2]

    def setup(self, student: StudentInfo | None = None) -> None:
        """Import the function."""
        self._resolve()

    def teardown(self) -> None:
        """Stop the event loop of an async function."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return the function's numbers, NaN where it returned None."""
        self.logged_metrics, self.logged_columns = {}, {}
        function = self._resolve()
        arguments = _accepted(function, {**self._arguments(rollouts), **self.kwargs})
        try:
            returned = function(**arguments)
            if inspect.isawaitable(returned):
                returned = self._wait_for(returned)
        except DistillkitError:
            raise
        except Exception as error:
            raise ScoringError(
                problem(
                    f"reward function {self.function} raised",
                    got=f"{type(error).__name__}: {error}",
                    expected=f"{len(rollouts)} numbers, None for a rollout that it does not concern",
                )
            ) from error
        values = self._numbers(returned, len(rollouts))
        bar = self.correct_above
        correct = [None if value is None or bar is None else value > bar for value in values]
        return RewardOutput.single(self.name, values, weight=self.weight, correct=correct)

    def _resolve(self) -> Callable[..., Any]:
        if self._callable is None:
            module, _, name = self.function.rpartition(".")
            try:
                self._callable = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise ConfigError(
                    problem(
                        f"reward function {self.function} cannot be imported",
                        got=f"{type(error).__name__}: {error}",
                        expected="a function in an installed module, or in one on PYTHONPATH",
                    )
                ) from error
        if not callable(self._callable):
            got = type(self._callable).__name__
            raise ConfigError(problem(f"reward function {self.function}", got=got, expected="something to call"))
        return self._callable

    def _arguments(self, rollouts: RolloutBatch) -> dict[str, Any]:
        columns = dict.fromkeys(name for row in rollouts.rows for name in row)
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)
        ]
        return {
            **{name: [row.get(name) for row in rollouts.rows] for name in columns if name not in _OWN_COLUMNS},
            "prompts": [prompt if isinstance(prompt, str) else list(prompt) for prompt in rollouts.prompts],
            "completions": completions,
            "completion_ids": [rollouts.completion_ids(i).tolist() for i in range(len(rollouts))],
            "trainer_state": TrainerState(global_step=max(0, int(rollouts.policy_version.max()))),
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }

    def _log_extra(self, column: str, values: list[Any]) -> None:
        self.logged_columns[column] = list(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.logged_metrics[name] = float(value)

    def _wait_for(self, result: Awaitable[Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run_loop, args=(self._loop,), name=f"reward-{self.name}", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_await(result), self._loop).result()

    def _numbers(self, returned: Any, count: int) -> list[float | None]:
        where, wanted = (
            f"reward function {self.function} returned",
            f"{count} finite numbers, or None, one per completion",
        )
        if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__len__"):
            raise ContractError(problem(where, got=type(returned).__name__, expected=f"a list of {wanted}"))
        if len(returned) != count:
            raise ContractError(problem(where, got=f"{len(returned)} values", expected=wanted))
        numbers: list[float | None] = []
        for i, value in enumerate(returned):
            try:
                number = None if value is None else float(value)
            except (TypeError, ValueError):
                number = math.inf
            if number is not None and math.isinf(number):
                raise ContractError(problem(where, got=f"{value!r:.80} for completion {i}", expected=wanted))
            numbers.append(None if number is None or math.isnan(number) else number)
        return numbers


def as_reward(reward: RewardFn | Callable[..., Any] | str, *, weight: float = 1.0) -> RewardFn:
    """Return `reward` as a `RewardFn`: itself, or a `FunctionReward` of a function or of the dotted path of one.

    Raises:
        ContractError: it is none of these.

    Example:
        >>> def brevity(completions, **kwargs):
        ...     return [-0.01 * len(text) for text in completions]
        >>> as_reward(brevity, weight=0.5).weight
        0.5
    """
    if isinstance(reward, RewardFn):
        return reward
    if isinstance(reward, str):
        return FunctionReward(function=reward, weight=weight)
    if callable(reward) and not inspect.isclass(reward):
        return FunctionReward.of(reward, weight=weight)
    expected = "a reward component, a function, or the dotted path of a function"
    raise ContractError(problem("rewards", got=f"{reward!r:.80}", expected=expected))


def _accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `arguments` that `function` takes; all of them when it has `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return dict(arguments)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in arguments.items() if name in names}


async def _await(result: Awaitable[Any]) -> Any:
    return await result


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()
