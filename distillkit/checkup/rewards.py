"""The verifier on gold rows: a completion that gives the gold answer has to be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from distillkit.checkup.checks import Finding
from distillkit.checkup.patient import Patient
from distillkit.components import RewardFn
from distillkit.rewards.extract import gold_answer
from distillkit.types import CORRECT, RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings

__all__ = ["verifier"]


def verifier(patient: Patient) -> Finding:
    """Give every reward that knows a gold answer ten rows' gold as completions, in the forms models write them."""
    name = "verifier"
    if not patient.module.rewards:
        return Finding(name=name, verdict="pass", text="no reward to look at")
    prompts = patient.prompts
    checked, rejected = [], []
    for reward in patient.module.rewards:
        kind = type(reward).__name__
        rows = [prompt.row for prompt in prompts]
        column = getattr(reward, "answer", None)
        if not isinstance(column, str):
            # Rewards that read the gold from other columns know it as text too where the data has an `answer`.
            if not isinstance(getattr(reward, "solution", None), str) or "answer" not in rows[0]:
                continue
            column = "answer"
        if unusable := reward.check_rows(rows):
            index, reason = unusable[0]
            text = f"{kind}: {len(unusable)} of {len(rows)} rows have no usable gold; row {index + 1}: {reason}"
            return Finding(
                name=name, verdict="fail", text=text, advice=f"data.train.columns: {{{column}: THEIR_COLUMN}}"
            )
        reward.setup(patient.info)
        try:
            right = [_accepts(patient, reward, row, column) for row in rows]
        finally:
            reward.teardown()
        if not any(right) and getattr(reward, "pattern", None) is not None:
            continue  # how an answer has to be written cannot be told from a regular expression
        checked.append(f"{kind}: the gold of {sum(right)} of {len(rows)} rows is right")
        if not all(right):
            row = rows[right.index(False)]
            rejected.append(f"{kind} rejects {row[column]!r:.60} as an answer to itself (row {right.index(False) + 1})")
    if rejected:
        text = "; ".join([*checked, *rejected])
        advice = "model.rewards: another reward or its arguments, or the data's gold column"
        return Finding(name=name, verdict="fail", text=text, advice=advice)
    if not checked:
        names = ", ".join(type(reward).__name__ for reward in patient.module.rewards)
        return Finding(name=name, verdict="warn", text=f"no gold answer to look at: {names}")
    return Finding(name=name, verdict="pass", text="; ".join(checked))


def _accepts(patient: Patient, reward: RewardFn, row: Mapping[str, Any], column: str) -> bool:
    """Whether one of the usual ways to write the row's gold is right, all asked at once."""
    texts = list(dict.fromkeys(_written(reward, row, column)))
    settings = SamplingSettings(group_size=len(texts), max_new_tokens=1)
    request = SampleRequest(
        prompt_ids=patient.info.eos_token_ids[:1], prompt="", row=row, group_id=0, seed=0, settings=settings
    )
    token = torch.tensor(patient.info.eos_token_ids[:1])
    rollouts = tuple(patient.rollout(token, text) for text in texts)
    batch = RolloutBatch.from_groups([RolloutGroup(request=request, rollouts=rollouts)], patient.info.pad_token_id)
    return bool((reward(batch).correct == CORRECT).any())


def _written(reward: RewardFn, row: Mapping[str, Any], column: str) -> Iterator[str]:
    gold = str(row[column])
    short = gold_answer(row[column]) or gold
    yield gold
    if isinstance(after := getattr(reward, "after", None), str):
        yield f"{after}{short}"
        yield f"{after} {gold}"
    yield f"So the answer is \\boxed{{{short}}}."
    yield f"#### {short}"
    yield f"<think>\n</think>\n<answer>{gold}</answer>"
    yield f"<think>\n</think>\n{gold}"
