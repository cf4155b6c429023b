"""Where the time of a phase goes: its share by kind of operation, under torch's profiler.

    python benchmarks/kinds.py measure [--cases fixed vocab] [--resume]
    python benchmarks/kinds.py table

One KDRL step of a case after two of warm-up, in a process of its own. Profiling makes every operation slower by some
microseconds, so the shares of phases with many small ones (rollout) lean to what is between operations.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cases import CASES, COMPARED, Case
from measuring import RESULTS, Record, lines, measured

RECORD = RESULTS / "kinds.jsonl"
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::_addmm", "mkl"),
    "attention": ("attention",),
    "softmax and log-probs": ("softmax", "logsumexp", "exp", "gather", "max", "topk", "sort", "cumsum"),
    "copies": ("copy", "cat", "clone", "contiguous", "index", "fill", "zero", "empty", "select", "slice", "repeat"),
    "element-wise": ("aten::",),
}
"""A name belongs to the first kind that has a part of it."""
PHASES = ("rollout", "teacher", "update")
_MARK = "phase: "


def kind(name: str) -> str:
    """Return the kind of an operation, of `other` where it is none of torch's own."""
    return next((key for key, parts in KINDS.items() if any(part in name for part in parts)), "other")


def shares(case: Case, method: str, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Return the share of each kind in each phase of one step; `between` is what no operation took."""
    import lightning.pytorch as pl
    import torch
    from step import measure
    from torch.profiler import ProfilerActivity, profile

    from distillkit.clock import PhaseClock

    plain, watch = PhaseClock.phase, profile(activities=[ProfilerActivity.CPU])

    @contextmanager
    def marked(clock: PhaseClock, name: str) -> Iterator[None]:
        with torch.profiler.record_function(_MARK + name), plain(clock, name):
            yield

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            if index == warm_up:
                watch.start()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, out: Any, batch: Any, index: int) -> None:
            if index == warm_up:
                watch.stop()

    with tempfile.TemporaryDirectory() as folder, patch.object(PhaseClock, "phase", marked):
        measure(case, method, steps=1, warm_up=warm_up, settings={}, folder=Path(folder), callbacks=[Watch()])
    return _by_phase(list(watch.events() or ()))


def _by_phase(events: Sequence[Any]) -> dict[str, dict[str, float]]:
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(_MARK))
        for e in events
        if e.name.startswith(_MARK) and e.name.removeprefix(_MARK) in PHASES
    )
    starts = [start for start, _, _ in spans]
    whole: Counter[str] = Counter()
    for start, end, phase in spans:
        whole[phase] += end - start
    took: dict[str, Counter[str]] = {phase: Counter() for phase in whole}
    for event in events:
        at = bisect_right(starts, event.time_range.start) - 1
        if at >= 0 and event.time_range.start < spans[at][1] and not event.name.startswith(_MARK):
            took[spans[at][2]][kind(event.name)] += event.self_cpu_time_total
    found = {phase: {key: took[phase][key] / whole[phase] for key in (*KINDS, "other")} for phase in took}
    return {phase: {**row, "between": max(0.0, 1.0 - sum(row.values()))} for phase, row in found.items()}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    heads = ["case", "phase", *KINDS, "between operations"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in results:
        for phase in PHASES:
            row = line["shares"].get(phase)
            if row is not None:
                cells = [f"{row[key]:.0%}" for key in KINDS] + [f"{row['between'] + row['other']:.0%}"]
                rows.append(f"| {line['case']} | {phase} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["measure", "case", "table"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(COMPARED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--resume", action="store_true", help="go on with the record")
    given = parser.parse_args()
    if given.do == "case":
        from surroundings import surroundings

        where = surroundings()
        case = CASES[given.cases[0]]
        print(json.dumps({"case": case.name, "shares": shares(case, "kdrl"), **where}))
        return
    if given.do == "measure":
        record = Record(given.record, ("case",), resume=given.resume)
        for case_name in given.cases:
            if not record.has(case=case_name):
                record.add(measured((sys.executable, __file__, "case", "--cases", case_name), given.threads))
    print(table(lines(given.record)))


if __name__ == "__main__":
    main()
