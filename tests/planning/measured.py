"""Run real steps of a recipe in this process and print its peak memory: a script of test_measured.py.

python -m tests.planning.measured RECIPE STEPS
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distillkit.backends import LocalBackend
from distillkit.cli.parsed import parse_recipe
from distillkit.components import StudentInfo
from distillkit.models import enable_gradient_checkpointing, load_causal_lm
from distillkit.scorer import StudentScorer
from distillkit.step import DistillationStep
from distillkit.types import SampleRequest


def noise(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that differs within every group, so that every rollout is learned from."""
    return [float(i % 2) + zlib.crc32(text.encode()) % 7 for i, text in enumerate(completions)]


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(recipe_path: str, steps: int) -> None:
    baseline = status("VmRSS")
    recipe = parse_recipe(["--config", recipe_path])
    module: Any = recipe.model
    model = load_causal_lm(module.student, where="model.student", dtype=module.dtype_name)
    if module.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    info = StudentInfo(
        tokenizer=module.tokenizer,
        vocab_limit=model.config.vocab_size,
        eos_token_ids=module.student_end_tokens(),
        pad_token_id=0,
        device=torch.device("cpu"),
    )
    scorer = StudentScorer(model.train(), vocab_limit=info.vocab_limit, head_chunk=module.head_chunk)
    for part in module.parts.components():
        part.setup(info)
    backend = LocalBackend(scorer, module.make_optimizer(list(scorer.parameters())))
    step = DistillationStep(module.parts, module.settings, scorer, info)
    data: Any = recipe.datamodule
    updates = 0
    for number in range(steps):
        requests = [
            SampleRequest(
                prompt_ids=tuple(2 + (number + i) % 15 for i in range(data.max_prompt_tokens)),
                prompt="",
                row={},
                group_id=group,
                seed=1000 * number + group,
                settings=module.sampler.settings,
            )
            for group in range(data.prompts_per_step)
        ]
        updates += step.run(requests, step=number, backend=backend).updates
    print(json.dumps({"baseline": baseline, "peak": status("VmHWM") - baseline, "updates": updates}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
