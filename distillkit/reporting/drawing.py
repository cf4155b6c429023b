"""Whether pictures can be drawn. matplotlib comes with an extra: torchmetrics imports it wherever it is installed.

A training process that draws nothing until its end would hold it all the while, and start later.
"""

from __future__ import annotations

import importlib.util

__all__ = ["INSTALL", "can_draw"]

INSTALL = "pip install 'distillkit[plots]'"


def can_draw() -> bool:
    """Return whether matplotlib is installed; it is not imported."""
    return importlib.util.find_spec("matplotlib") is not None
