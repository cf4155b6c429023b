"""docs/performance.md and its plots are what the records give, and every run that the page promises is on record."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import growth
import overhead
import pytest
import run
import switches
from cases import COMPARED
from measuring import lines
from performance import report

ROOT = Path(__file__).parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, Any]]]:
    found = {name: lines(RESULTS / f"{name}.jsonl") for name in report.RECORDS}
    assert all(found.values()), f"not measured: {[name for name in found if not found[name]]}"
    return found


def test_the_page_is_what_the_records_give(records: dict[str, list[dict[str, Any]]]) -> None:
    assert (DOCS / "performance.md").read_text() == report.page(records)


def test_the_plots_are_there_and_show_every_case() -> None:
    text = {name: "".join(ET.parse(DOCS / name).getroot().itertext()) for name in report.PLOTS}
    assert all(case in text["performance_steps.svg"] for case in COMPARED)
    assert all(axis in text["performance_growth.svg"] for axis in growth.AXES)


def test_every_run_of_the_comparison_is_on_record(records: dict[str, list[dict[str, Any]]]) -> None:
    found = Counter((r["case"], r["method"], r["side"], r["mode"]) for r in records["speed"])
    wanted = [turn for case in COMPARED for turn in run.turns(case, "python", 5)]
    assert set(found) == {(t.case, t.method, t.side, t.mode) for t in wanted}
    for key, rounds in found.items():
        assert rounds == 2 or (key[3] == "tuned" and rounds == 1)
        one = [r for r in records["speed"] if (r["case"], r["method"], r["side"], r["mode"]) == key]
        assert sum(len(r["seconds"]) for r in one) >= (5 if rounds == 2 else 3)
    run.check_same_work(records["speed"])


def test_both_sides_ran_the_same_versions_with_the_same_threads(records: dict[str, list[dict[str, Any]]]) -> None:
    versions = {(r["versions"]["torch"], r["versions"]["transformers"], r["threads"]) for r in records["speed"]}
    assert len(versions) == 1
    for name, found in records.items():
        assert len({r["machine"]["processor"] for r in found if "machine" in r}) == 1, name


def test_every_other_measurement_is_on_record(records: dict[str, list[dict[str, Any]]]) -> None:
    assert {r["case"] for r in records["kdrl"]} == set(run.SAME_SIZE)
    assert all(r["settings"] == {"skip_zero_weight": False} for r in records["kdrl"])
    assert {r["switch"] for r in records["switches"]} == {*switches.SWITCHES, switches.GAP}
    points = {(r["axis"], r["factor"]) for r in records["growth"]} - {("imports", 0)}
    assert points == {(axis, factor) for axis in growth.AXES for factor in growth.FACTORS}
    assert {r["rollouts"] for r in records["overhead"]} == set(overhead.ROLLOUTS)


def test_the_frameworks_own_time_is_within_its_budget(records: dict[str, list[dict[str, Any]]]) -> None:
    found = overhead.medians(records["overhead"], "outside")
    assert set(found) == set(overhead.ROLLOUTS)
    for rollouts, seconds in found.items():
        assert seconds <= overhead.PER_STEP + overhead.PER_ROLLOUT * rollouts
