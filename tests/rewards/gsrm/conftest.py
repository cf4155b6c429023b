from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of these tests are on this machine, whatever proxy its environment names."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
