"""Measure the phases of a step under every strategy, and with every sampler; print the tables of docs/scaling.md.

    python benchmarks/strategies.py measure strategies [--results benchmarks/results/strategies.jsonl]
    python benchmarks/strategies.py measure samplers      # in an environment with vLLM
    python benchmarks/strategies.py table

Each run is `distillkit fit --config quickstart` on a student and a teacher built here, with one thread for each
process. The first two steps of a run are warm-up. A round measures every case once, so that a slow minute of the
machine does not fall on one of them alone; the table has medians over all rounds' steps. Memory is the largest resident
set of any of its processes (VmHWM), less what the imports alone take.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP, STEPS = 2, 5
PHASES = ("sync", "rollout", "teacher", "update", "step")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    name: str
    ranks: int
    arguments: tuple[str, ...]


def _strategy(name: str, *more: str) -> tuple[str, ...]:
    return "--trainer.strategy", name, "--trainer.devices", "2", *more


CASES = {
    "strategies": [
        Case("one process", 1, ()),
        Case("ddp", 2, _strategy("ddp")),
        Case("fsdp2", 2, _strategy("fsdp2")),
        Case("deepspeed_stage_2", 2, _strategy("deepspeed_stage_2")),
        Case("deepspeed_stage_3", 2, _strategy("deepspeed_stage_3")),
    ],
    "samplers": [
        Case("hf", 1, ()),
        Case("vllm", 1, ("--model.sampler", "vllm")),
        Case("vllm_server", 1, ("--model.sampler", "vllm_server")),
        Case("vllm_server, one_step_off", 1, ("--model.sampler", "vllm_server", "--model.one_step_off", "true")),
    ],
}


def write_models(folder: Path) -> None:
    """Write a student and a teacher of 32 M parameters over the package's vocabulary."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from distillkit import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.resolve("embedded:student"))
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def descendants(root: int) -> list[int]:
    """Return the ids of a process and all that came of it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, new = [root], [root]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def resident_peak(pid: int) -> int:
    """Return the largest resident set of a process so far, in KiB; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")), 0)


def imports_peak() -> int:
    """Return the resident set of a process that imported what training imports, in KiB."""
    code = (
        "import resource, distillkit.cli.main, distillkit.training.on_policy, transformers.models.qwen2.modeling_qwen2;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measure(case: Case, models: Path, folder: Path) -> dict[str, Any]:
    """Run one case; return the seconds of each phase by step, tokens by step, and the peak of its largest process."""
    command = [
        sys.executable, "-m", "distillkit", "fit", "--config", "quickstart", "--run_dir", str(folder),
        "--model.student", str(models / "student"), "--model.teacher.path", str(models / "teacher"),
        "--trainer.accelerator", "cpu", "--trainer.max_steps", str(WARM_UP + STEPS), "--data.val", "null",
        "--trainer.val_check_interval", "100", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
        "--model.sampler.max_new_tokens", "32", "--model.tokens_per_micro_batch", "512", *case.arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = folder.with_suffix(".log")
    peaks: dict[int, int] = {}
    with log.open("w") as stream:
        running = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        while running.poll() is None:
            peaks.update({pid: peak for pid in descendants(running.pid) if (peak := resident_peak(pid))})
            time.sleep(0.1)
    if running.returncode:
        raise SystemExit(f"{case.name}: exit {running.returncode}\n{log.read_text()[-3000:]}")
    with (folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["time/step"]][WARM_UP:]
    return {
        "case": case.name,
        "ranks": case.ranks,
        "seconds": {phase: [float(row[f"time/{phase}"] or 0) for row in rows] for phase in PHASES},
        "tokens": [float(row["train/completion_length"]) for row in rows],
        "peak_gib": (max(peaks.values()) - imports_peak()) / 2**20,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of medians."""
    heads = ["run", "processes", *(f"{phase}, s" for phase in PHASES), "peak of a process, GiB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(result["case"] for result in results):
        runs = [result for result in results if result["case"] == name]
        seconds = [statistics.median(s for run in runs for s in run["seconds"][phase]) for phase in PHASES]
        peak = statistics.median(run["peak_gib"] for run in runs)
        cells = [name, str(runs[0]["ranks"]), *(f"{value:.2f}" for value in seconds), f"{peak:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "table"])
    parser.add_argument("what", nargs="?", choices=list(CASES), default="strategies")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "strategies.jsonl")
    given = parser.parse_args()
    if given.do == "measure":
        with tempfile.TemporaryDirectory() as scratch:
            models = Path(scratch)
            write_models(models)
            for turn in range(given.rounds):
                for number, case in enumerate(CASES[given.what]):
                    found = measure(case, models, models / f"run-{turn}-{number}")
                    with given.results.open("a") as stream:
                        stream.write(json.dumps({"what": given.what, "round": turn, **found}) + "\n")
    results = [json.loads(line) for line in given.results.read_text().splitlines()]
    print(table([result for result in results if result["what"] == given.what]))


if __name__ == "__main__":
    main()
