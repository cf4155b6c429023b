"""Rules for every part's class, and the way from a part to its suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import pytest

from distillkit.components import BetaScheduler, Component
from distillkit.divergences.sampled import K2
from distillkit.testing import ConformanceError, check, check_class


class Fine(BetaScheduler):
    """A number.

    Args:
        size: how much.
    """

    def __init__(self, *, size: float = 1.0) -> None:
        self.size = size

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        return self.size


class Positional(Fine):
    def __init__(self, size: float = 1.0) -> None:
        super().__init__(size=size)


class Untyped(Fine):
    def __init__(self, *, size=1.0) -> None:  # type: ignore[no-untyped-def]
        super().__init__(size=size)


class Named(Fine):
    """A number.

    Args:
        name: taken.
    """

    def __init__(self, *, name: str = "x") -> None:
        super().__init__()


class Undocumented(Fine):
    def __init__(self, *, size: float = 1.0, speed: float = 1.0) -> None:
        super().__init__(size=size)


class NotJson(Fine):
    def __init__(self, *, size: Any = object()) -> None:  # noqa: B008
        super().__init__(size=1.0)


class Catchall(Fine):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class Abstract(BetaScheduler):
    """A number some day."""


class Silent(BetaScheduler):
    def value(self, step: int, signals: Mapping[str, float]) -> float:
        return 1.0


class ChangesItself(Fine):
    def at(self, values: Mapping[str, float]) -> Self:
        for name, value in values.items():
            setattr(self, name, value)
        return self


class Immovable(Fine):
    def at(self, values: Mapping[str, float]) -> Self:
        return self


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Positional, "constructor argument 'size' is not keyword-only"),
        (Untyped, "constructor argument 'size' has no type"),
        (Named, "constructor argument 'name' is reserved"),
        (Undocumented, "constructor argument 'speed' is not documented under Args"),
        (NotJson, "the default of constructor argument 'size' is not JSON"),
        (Catchall, "constructor argument 'kwargs' is not keyword-only"),
        (Abstract, "is abstract: value not implemented"),
        (Silent, "has no docstring"),
        (K2, "is no beta: BetaScheduler is not its base class"),
        (dict, "is no beta: BetaScheduler is not its base class"),
    ],
)
def test_class_rules_are_found(cls: type, text: str) -> None:
    with pytest.raises(ConformanceError) as error:
        check_class("beta", cls)
    assert any(text in failure for failure in error.value.failures), error.value.failures


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (ChangesItself(), "at() changes the part itself: size"),
        (Immovable(), "at() does not set size"),
        (Positional(), "constructor argument 'size' is not keyword-only"),
    ],
)
def test_rules_for_instances_are_found(part: Component, text: str) -> None:
    with pytest.raises(ConformanceError) as error:
        check(part)
    assert text in error.value.failures


def test_a_fine_class_passes_with_its_suite() -> None:
    check(Fine())
    assert check_class("beta", Fine) == "constructor and suite"


def test_the_message_lists_every_broken_rule() -> None:
    class Bad(BetaScheduler):
        def __init__(self, speed=1.0) -> None:  # type: ignore[no-untyped-def]
            pass

        def value(self, step: int, signals: Mapping[str, float]) -> float:
            return 1.0

    with pytest.raises(ConformanceError) as error:
        check_class("beta", Bad)
    assert str(error.value) == (
        "Bad breaks its contract:\n"
        "  - has no docstring\n"
        "  - constructor argument 'speed' is not keyword-only\n"
        "  - constructor argument 'speed' has no type\n"
        "  - constructor argument 'speed' is not documented under Args"
    )


def test_what_is_no_part_is_said() -> None:
    with pytest.raises(ConformanceError, match="dict of kind None breaks its contract"):
        check({})  # type: ignore[arg-type]
