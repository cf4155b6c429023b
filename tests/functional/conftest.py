"""Toy policies as fixtures."""

from __future__ import annotations

import pytest
import torch

from tests.functional.toy_policy import ToyPolicy, shared, table


@pytest.fixture(params=["table", "shared"])
def student(request: pytest.FixtureRequest) -> ToyPolicy:
    make = {"table": table, "shared": shared}[request.param]
    return make(torch.Generator().manual_seed(1))


@pytest.fixture
def teacher() -> ToyPolicy:
    return table(torch.Generator().manual_seed(2))


@pytest.fixture
def behaviour() -> ToyPolicy:
    return table(torch.Generator().manual_seed(3))
