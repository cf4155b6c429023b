"""What one rank does for all: the others wait, and fail when it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from distillkit import errors

__all__ = ["lead"]


def lead(work: Callable[[], Mapping[str, Any]], adopt: Callable[[Mapping[str, Any]], None], device: Any) -> None:
    """Let rank 0 do `work` once every rank has come here, and every rank `adopt` what it returned.

    Without a torch.distributed group there is one rank. `device` is where the group's backend can communicate.

    Raises:
        DistillkitError: on every rank, when the work raised one on rank 0; other errors become RolloutError there.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        adopt(work())
        return
    arrived = torch.zeros(1, device=device)
    distributed.all_reduce(arrived)
    outcome: list[Any] = [None]
    failure: BaseException | None = None
    if distributed.get_rank() == 0:
        try:
            outcome = [("done", dict(work()))]
        except BaseException as error:
            failure = error
            outcome = [(type(error).__name__, str(error))]
    distributed.broadcast_object_list(outcome, src=0, device=torch.device(device))
    if failure is not None:
        raise failure
    kind, result = outcome[0]
    if kind != "done":
        known = getattr(errors, kind, None) if kind in errors.__all__ else None
        raise (known if isinstance(known, type) else errors.RolloutError)(f"rank 0: {result}")
    adopt(result)
