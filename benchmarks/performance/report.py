"""docs/performance.md and its plots, from the records and `page.md`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import growth
import kinds
import overhead
import switches
from measuring import lines

from performance import figures, tables
from performance.reasons import REASONS

__all__ = ["PLOTS", "RECORDS", "page", "plots", "write_report"]

RECORDS = ("speed", "kinds", "kdrl", "switches", "growth", "overhead")
PLOTS = ("performance_steps.svg", "performance_growth.svg")
_PAGE = Path(__file__).with_name("page.md")


def write_report(results: Path, docs: Path) -> None:
    """Write the page and its plots into `docs`.

    Raises:
        SystemExit: a record is missing.
    """
    records = _read(results)
    (docs / "performance.md").write_text(page(records))
    for name, image in plots(records).items():
        (docs / name).write_bytes(image)


def _read(results: Path) -> dict[str, list[dict[str, Any]]]:
    records = {name: lines(results / f"{name}.jsonl") for name in RECORDS}
    if missing := [name for name, found in records.items() if not found]:
        raise SystemExit(f"{results}: nothing measured of {', '.join(missing)}")
    return records


def page(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return docs/performance.md."""
    intercept, slope = overhead.fit(records["overhead"])
    profiles = [line for line in records["overhead"] if line["do"] == "profile"]
    gaps = next((line["gaps"] for line in records["switches"] if line["switch"] == switches.GAP), None)
    return _PAGE.read_text().format(
        measured=_measured(records),
        speed=tables.speed(records["speed"]),
        distances=tables.distances(records["speed"], REASONS),
        kinds=kinds.table(records["kinds"]),
        kdrl=tables.kdrl(records["kdrl"]),
        switches=switches.table(records["switches"]),
        gap="" if gaps is None else _gap(gaps),
        growth=growth.table(records["growth"]),
        overhead=overhead.table(records["overhead"]),
        per_step=f"{1e3 * intercept:.1f}",
        per_rollout=f"{1e3 * slope:.3f}",
        profile="\n\n".join(
            f"{p['rollouts']} rollouts:\n\n{overhead.profiled(p)}" for p in (profiles[0], profiles[-1])
        ),
    )


def plots(records: dict[str, list[dict[str, Any]]]) -> dict[str, bytes]:
    """Return the plots by file name."""
    drawn = (figures.steps_plot(records["speed"]), figures.growth_plot(records["growth"]))
    return dict(zip(PLOTS, drawn, strict=True))


def _measured(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return where, when and with what: a row for each record."""
    rows = []
    for name, found in records.items():
        runs = [line for line in found if "versions" in line]
        versions: dict[str, dict[str, None]] = {}
        for line in runs:
            for package, version in line["versions"].items():
                versions.setdefault(package, {})[version] = None
        with_what = ", ".join(f"{package} {' and '.join(every)}" for package, every in sorted(versions.items()))
        begin, end = (datetime.fromtimestamp(pick(r["started"] for r in runs), UTC) for pick in (min, max))
        machines = {f"{r['machine']['processor']}, {r['machine']['cores']} cores, {_gib(r)} GiB": None for r in runs}
        threads = " and ".join(str(n) for n in dict.fromkeys(r["threads"] for r in runs))
        loads = f"at most {max(r['load'] for r in runs):.1f}"
        dates = begin.strftime("%Y-%m-%d") if begin.date() == end.date() else f"{begin:%Y-%m-%d} to {end:%Y-%m-%d}"
        rates = f"{_rates([r['flops_per_second'] / 1e9 for r in runs])}"
        rows.append((name, dates, "; ".join(machines), threads, with_what, rates, loads))
    heads = ("record", "date", "machine", "threads", "versions", "matrix product, GFLOP/s", "load before a run")
    return tables.markdown(heads, rows)


def _gib(line: dict[str, Any]) -> int:
    return round(line["machine"]["memory_bytes"] / 2**30)


def _rates(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def _gap(gaps: dict[str, Any]) -> str:
    heads = ("models", "tokens", "mean NLL, nats/token", "mean gap", "largest gap", "mean of the signed gap")
    rows = [
        (
            name,
            str(gaps[name]["tokens"]),
            *(_figure(gaps[name][key]) for key in ("nll", "mean_gap", "largest_gap", "bias")),
        )
        for name in ("random", "trained")
    ]
    return tables.markdown(heads, rows)


def _figure(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"
