"""How the tests of the suites say what must be found."""

from __future__ import annotations

from typing import Any

import pytest

from distillkit.components import Component
from distillkit.testing import ConformanceError, check


def finds(part: Component, text: str, **given: Any) -> None:
    """Assert that the slot's suite fails `part`, and names the rule."""
    with pytest.raises(ConformanceError) as error:
        check(part, **given)
    found = error.value.failures
    assert any(text in failure for failure in found), f"{text!r} is not among {found}"
    assert str(error.value).startswith(f"{type(part).__name__} breaks its contract:\n  - ")
