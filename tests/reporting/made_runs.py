"""Run folders written by hand: what a fit leaves of its config, its curves and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillkit.cli.yaml_file import dump_yaml
from distillkit.evaluation.results import CompletionResult, ProblemResult, write_results
from distillkit.reporting.metrics import MetricsCSV
from distillkit.reporting.run_folder import RunFolder, RunState, atomic_write_text

Answers = Sequence[Sequence[bool | None]]
"""Per problem, whether each of its completions is right; None: could not be scored."""


def config(seed: int = 1, beta: float = 0.2, **more: Any) -> dict[str, Any]:
    part = {"class_path": "distillkit.betas.constant.Constant", "init_args": {"value": beta}}
    return {"seed_everything": seed, "run_dir": None, "model": {"student": "a", "beta": part, **more}}


def completion(correct: bool | None) -> CompletionResult:
    status = {"answer": "timed_out" if correct is None else "scored"}
    return CompletionResult(text="x", correct=correct, answer="x", truncated=False, length=3, status=status)


def problems(answers: Answers, *, set_name: str = "held_out", gold: str = "7") -> list[ProblemResult]:
    return [
        ProblemResult(set_name=set_name, index=i, prompt=f"p{i}", gold=gold, completions=tuple(map(completion, given)))
        for i, given in enumerate(answers)
    ]


def make_run(
    folder: str | Path,
    steps: Mapping[int, Answers],
    *,
    settings: Mapping[str, Any] | None = None,
    name: str = "made",
    state: RunState = "finished",
    sets: Sequence[str] = ("held_out",),
    gold: str = "7",
) -> Path:
    """Write a run whose pass@1 is the mean of its answers at each step."""
    run = RunFolder(Path(folder))
    run.path.mkdir(parents=True)
    run.begin(name, "fit")
    atomic_write_text(run.config_yaml, dump_yaml(dict(config() if settings is None else settings)))
    logger = MetricsCSV(folder=run.path)
    for step, answers in steps.items():
        shares = [sum(map(bool, given)) / max(sum(c is not None for c in given), 1) for given in answers]
        for set_name in sets:
            values = {f"val/{set_name}/pass@1": sum(shares) / len(shares), f"val/{set_name}/length": 3.0 + step}
            logger.log_metrics({**values, "train/reward": 0.5}, step=step)
            path = run.eval / f"{set_name}.jsonl"
            write_results(path, problems(answers, set_name=set_name, gold=gold), step=step)
    run.end(state)
    return run.path
