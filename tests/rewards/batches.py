"""Rollout batches made by hand, and the real problem sets where they are there."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.types import Prompt, Rollout, RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings

DATA = Path(os.environ.get("DISTILLKIT_DATA") or Path(__file__).parents[2] / "../shared/data")


def batch(
    texts: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    prompts: Sequence[Prompt] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
    version: int = 0,
) -> RolloutBatch:
    """One group of one rollout per text; a completion is as many tokens as its text has characters, at most 8."""
    settings = SamplingSettings(group_size=1, max_new_tokens=max_new_tokens)
    groups = []
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        ids = list(range(1, 1 + min(8, max(1, len(text))))) if completion_ids is None else list(completion_ids[i])
        request = SampleRequest(
            prompt_ids=(1, 2, 3)[: 1 + i % 3],
            prompt="?" if prompts is None else prompts[i],
            row=row,
            group_id=i,
            seed=i,
            settings=settings,
            policy_version=version,
        )
        rollout = Rollout(
            completion_ids=torch.tensor(ids),
            behaviour_logprobs=torch.zeros(len(ids)),
            loss_mask=torch.ones(len(ids), dtype=torch.bool),
            policy_version=torch.full((len(ids),), version),
            finish_reason="stop",
            text=text,
        )
        groups.append(RolloutGroup(request=request, rollouts=(rollout,)))
    return RolloutBatch.from_groups(groups, pad_id=0)


@functools.cache
def problems(name: str) -> list[dict[str, Any]]:
    """Return the rows of a problem set, such as `gsm8k/test.jsonl`; skip the test where the folder is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there: the real problem sets are not part of the package; set DISTILLKIT_DATA")
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
