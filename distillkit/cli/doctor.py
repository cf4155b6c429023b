"""`distillkit doctor`: a recipe's models, data, engine and memory, looked at before hours are spent."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from distillkit.checkup.checks import Check, run_checks
from distillkit.checkup.engine import engine_gap
from distillkit.checkup.memory import memory
from distillkit.checkup.models import end_and_template, self_divergence, teacher_probe, vocabulary
from distillkit.checkup.patient import Patient
from distillkit.checkup.rewards import verifier
from distillkit.cli.parsed import parse_recipe, split
from distillkit.errors import ConfigError, problem
from distillkit.planning.head_arrays import start_profiler

__all__ = ["checks_of", "main"]


def main(argv: Sequence[str]) -> int:
    """Run `distillkit doctor`; return 0 when no check failed, else 1.

    Raises:
        ConfigError: the recipe cannot be used.
    """
    options, arguments = split(_parser(), argv)
    if options.timeout <= 0:
        raise ConfigError(problem("--timeout", got=options.timeout, expected="seconds, above 0"))
    recipe = parse_recipe(arguments)
    trainer: Any = recipe.trainer_settings
    module: Any = recipe.model
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    # What is fitted with the run's seed, such as new students, reads it from here.
    os.environ["PL_GLOBAL_SEED"] = str(recipe.seed)
    patient = Patient(
        module,
        recipe.datamodule,
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        precision=str(trainer.precision or "32-true"),
        strategy=trainer.strategy,
        ranks=trainer.devices if isinstance(trainer.devices, int) and trainer.devices > 0 else 1,
        name=recipe.recipe.name,
        seed=recipe.seed,
    )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    start_profiler()
    counts: Counter[str] = Counter()
    found = []
    for finding in run_checks(patient, checks_of(patient), seconds=options.timeout):
        counts[finding.verdict] += 1
        found.append(vars(finding))
        if not options.json:
            print(finding.line, flush=True)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("pass", "warn", "fail")), flush=True)
    return 1 if counts["fail"] else 0


def checks_of(patient: Patient) -> list[Check]:
    """Return the checks that apply to a recipe; memory comes first, so that no model is loaded that cannot fit."""
    frozen = [Check(name=role, look=partial(teacher_probe, role=role)) for role in patient.module.frozen]
    own = [Check(name="student as its own teacher", look=self_divergence)] if frozen else []
    return [
        Check(name="memory", look=memory),
        Check(name="vocabulary", look=vocabulary),
        Check(name="end token and template", look=end_and_template),
        *frozen,
        *own,
        Check(name="verifier", look=verifier),
        Check(name="engine", look=engine_gap),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit doctor",
        allow_abbrev=False,
        description="Look at a recipe before it is run: one line a check, pass, warn or fail, and what to do. Exit "
        "code 1 when a check failed. Settings of the recipe can be overridden as in distillkit fit.",
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds for a check (default: 300)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
