"""What each optimisation is worth: its own switch on and off, on the case where it matters, in turn.

    python benchmarks/switches.py measure [--only NAME ...] [--rounds 2] [--resume]
    python benchmarks/switches.py table

Each run is a process of its own, on, off, and again. What a teacher in bfloat16 says otherwise than one in float32 is
measured beside its time: on the case's models, whose weights are random, and on the package's own, which are trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES, Case, prompts, write_inputs
from measuring import RESULTS, ROOT, Record, lines, measured, write_inputs_apart

RECORD = RESULTS / "switches.jsonl"
_KEY = ("switch", "state", "round")
_WHOLE = 10**9
_CHUNK = 2**24 // CASES["vocab"].vocabulary
"""Positions of 64 MiB of logits."""


@dataclass(frozen=True)
class Switch:
    """An optimisation: the case and method on which it matters, and the settings of `step.py` on and off."""

    case: str
    method: str
    off: tuple[str, ...]
    on: tuple[str, ...] = ()


SWITCHES = {
    "row compaction": Switch("tail", "grpo", ("sampler.drop_finished=false",)),
    "prompt prefilled once per group": Switch("long", "grpo", ("sampler.prefill_once=false",)),
    "prompt shared in scoring and training": Switch("long", "kdrl", ("batching=sorted", "teacher.batching=sorted")),
    "no padding in scoring and training": Switch("tail", "kdrl", ("batching=sorted", "teacher.batching=sorted")),
    "head in chunks": Switch(
        "vocab",
        "distil",
        off=(f"head_chunk={_WHOLE}", f"teacher.head_chunk={_WHOLE}"),
        on=(f"head_chunk={_CHUNK}", f"teacher.head_chunk={_CHUNK}"),
    ),
    "vocabulary in tiles, not positions in chunks": Switch(
        "vocab", "kdrl", (f"head_chunk={_CHUNK}", f"teacher.head_chunk={_CHUNK}")
    ),
    "vocabulary in tiles, not positions in chunks: exact KL": Switch(
        "vocab", "distil", (f"head_chunk={_CHUNK}", f"teacher.head_chunk={_CHUNK}")
    ),
    "zero-weight skipping": Switch("sparse", "grpo", ("skip_zero_weight=false",)),
    "length-sorted token budget": Switch(
        "tail",
        "kdrl",
        off=("batching=in_order", "teacher.batching=in_order"),
        on=("batching=sorted", "teacher.batching=sorted"),
    ),
    "2,048 tokens in a forward, not 16,384": Switch(
        "fixed", "kdrl", off=(), on=("tokens_per_micro_batch=2048", "teacher.tokens_per_batch=2048")
    ),
    "teacher in bfloat16": Switch("fixed", "distil", ("teacher.dtype=float32",), ("teacher.dtype=bfloat16",)),
    "teacher in bfloat16, large vocabulary": Switch(
        "vocab", "distil", ("teacher.dtype=float32",), ("teacher.dtype=bfloat16",)
    ),
}
GAP = "teacher in bfloat16: gap"


def gap(student: str, teacher: str, texts: Sequence[str], group_size: int, new_tokens: int) -> dict[str, float]:
    """Return how far a teacher's log-probs in bfloat16 are from its own in float32, nats/token, on rollouts."""
    import torch

    from distillkit import HFSampler, LocalTeacher
    from distillkit.components import StudentInfo
    from distillkit.models import load_causal_lm, load_tokenizer
    from distillkit.scorer import StudentScorer
    from distillkit.types import RolloutBatch, SampleRequest, ScoreRequest

    own, model = load_tokenizer(student, where="student"), load_causal_lm(student, where="student", dtype="float32")
    ends, padding = own.eos_token_id, own.pad_token_id
    assert isinstance(ends, int) and isinstance(padding, int)
    rows = model.get_output_embeddings().weight.shape[0]
    info = StudentInfo(
        tokenizer=own, vocab_limit=rows, eos_token_ids=(ends,), pad_token_id=padding, device=torch.device("cpu")
    )
    sampler = HFSampler(group_size=group_size, max_new_tokens=new_tokens)
    sampler.setup(info)
    sampler.sync(StudentScorer(model, vocab_limit=rows))
    requests = [
        SampleRequest(
            prompt_ids=tuple(own(text)["input_ids"]), prompt=text, row={}, group_id=i, seed=i, settings=sampler.settings
        )
        for i, text in enumerate(texts)
    ]
    batch = RolloutBatch.from_groups(list(sampler.sample(requests)), padding)
    said = []
    for dtype in ("float32", "bfloat16"):
        part = LocalTeacher(path=teacher, dtype=dtype)
        part.setup(info)
        scores = part.score(batch, ScoreRequest(sampled=True)).sampled
        assert scores is not None
        said.append(scores[batch.loss_mask])
    apart = said[1] - said[0]
    return {
        "mean_gap": float(apart.abs().mean()), "largest_gap": float(apart.abs().max()), "bias": float(apart.mean()),
        "tokens": int(batch.loss_mask.sum()), "nll": float(-said[0].mean()),
    }  # fmt: skip


def gaps(case: Case) -> dict[str, dict[str, float]]:
    """Return the gap on the case's models and on the package's own."""
    from distillkit.embedded import arithmetic

    with tempfile.TemporaryDirectory() as folder:
        write_inputs(case, Path(folder), 1)
        ours, theirs = (str(Path(folder) / name) for name in ("student", "teacher"))
        found = {"random": gap(ours, theirs, prompts(case, 1), case.group_size, case.new_tokens)}
    texts = [row["prompt"] for row in arithmetic.held_out()[:16]]
    return {**found, "trained": gap("embedded:student", "embedded:teacher", texts, 8, 64)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    heads = ["optimisation", "case, method", "on, s", "off, s", "times faster", "on, GiB", "off, GiB", "share"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, switch in SWITCHES.items():
        runs = [[r for r in results if (r["switch"], r["state"]) == (name, state)] for state in ("on", "off")]
        if not all(runs):
            continue
        on, off = (statistics.median(s for r in own for s in r["seconds"]) for own in runs)
        small, large = (statistics.median(r["peak_bytes"] for r in own) / 2**30 for own in runs)
        cells = [name, f"{switch.case}, {switch.method}", f"{on:.2f}", f"{off:.2f}", f"**{off / on:.2f}**"]
        rows.append(f"| {' | '.join([*cells, f'{small:.2f}', f'{large:.2f}', f'{small / large:.2f}'])} |")
    return "\n".join(rows)


def command(switch: Switch, state: str, case: str | None, steps: int, warm_up: int) -> list[str]:
    """Return the run of one state; `case` instead of the switch's own."""
    settings = switch.on if state == "on" else switch.off
    sizes = ["--steps", str(steps), "--warm-up", str(warm_up)]
    where = ["--case", case or switch.case, "--method", switch.method]
    more = ["--set", *settings] if settings else []
    return [sys.executable, str(ROOT / "benchmarks" / "step.py"), *where, *sizes, *more]


def go(name: str, case: str | None, steps: int, warm_up: int, rounds: int, threads: int, record: Record) -> None:
    """Run one switch on and off in turn, but for the runs on record; `case` instead of its own."""
    switch = SWITCHES[name]
    with tempfile.TemporaryDirectory() as folder:
        for turn, state in itertools.product(range(rounds), ("on", "off")):
            key = {"switch": name, "state": state, "round": turn}
            if record.has(**key):
                continue
            if not any(Path(folder).iterdir()):
                write_inputs_apart(case or switch.case, warm_up + steps, Path(folder))
            own = (*command(switch, state, case, steps, warm_up), "--inputs", folder)
            record.add({**measured(own, threads), **key})


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "gap", "table"])
    parser.add_argument("--only", nargs="+", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--case", choices=list(CASES), help="on this case instead, to try it out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--resume", action="store_true", help="go on with the record")
    given = parser.parse_args()
    dtype = "teacher in bfloat16"
    if given.do == "gap":
        print(json.dumps(gaps(CASES[given.case or SWITCHES[dtype].case])))
        return
    if given.do == "measure":
        record = Record(given.record, _KEY, resume=given.resume)
        for name in given.only:
            go(name, given.case, given.steps, given.warm_up, given.rounds, given.threads, record)
        key = {"switch": GAP, "state": "", "round": 0}
        if dtype in given.only and not record.has(**key):
            own = [sys.executable, __file__, "gap", "--case", given.case or SWITCHES[dtype].case]
            record.add({"gaps": measured(own, given.threads), **key})
    print(table(lines(given.record)))


if __name__ == "__main__":
    main()
