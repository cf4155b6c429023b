"""What measures runs and remembers them, and the page that is written from the records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import growth
import kinds
import limit
import measuring
import overhead
import pytest
import run
import step
import switches
from cases import CASES, COMPARED
from performance import report, tables
from surroundings import surroundings

TINY = CASES["tiny"]
HOLDS = "x = bytearray(200_000_000); del x"


@pytest.fixture(scope="module", autouse=True)
def _seeds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # Lightning leaves them set
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """A small record of each kind: our side is measured here, TRL's is ours, some times as slow and as large."""
    where = {**surroundings(trl="1"), "started": 1_800_000_000, "load": 0.5}
    ours = []
    for method in step.METHODS:
        folder = tmp_path_factory.mktemp(method)
        found = step.measure(TINY, method, steps=3, warm_up=1, settings={}, folder=folder)
        ours.append({**found, **where, "mode": "", "round": 0, "peak_bytes": 2**30})
    trl = [
        {**r, "side": "trl", "mode": mode, "seconds": [times * s for s in r["seconds"]], "peak_bytes": times * 2**29}
        for r in ours[:2]
        for mode, times in (("default", 8), ("best", 4), ("tuned", 2))
        if (r["method"], mode) != ("distil", "tuned")
    ]
    states = [
        {**ours[0], "switch": name, "state": state, "seconds": [seconds] * 3}
        for name in switches.SWITCHES
        for state, seconds in (("on", 2.0), ("off", 3.0))
    ]
    gap = switches.gap("embedded:student", "embedded:teacher", ["1+2>"], group_size=2, new_tokens=4)
    states.append({"switch": switches.GAP, "state": "", "gaps": {"random": gap, "trained": gap}})
    grown = [growing(axis, factor, where) for axis in growth.AXES for factor in growth.FACTORS]
    grown.append({"axis": "imports", "factor": 0, "peak_bytes": 2**29, **where})
    own = [{**overhead.measure(n, 3, 1), "do": "point", **where} for n in (1, 16)]
    own.append({"do": "profile", "rollouts": 16, "entries": overhead.entries(16, 2, 1), **where})
    shares = {"case": "tiny", "shares": kinds.shares(TINY, "kdrl", warm_up=1), **where}
    return {"speed": ours + trl, "kinds": [shares], "kdrl": ours, "switches": states, "growth": grown, "overhead": own}


def growing(axis: str, factor: int, where: dict[str, Any]) -> dict[str, Any]:
    """Linear time; memory with the square of the factor."""
    case, _ = growth.at(CASES["growth"], axis, factor)
    flops = limit.floor(case, "kdrl", case.new_tokens).update
    sizes = {"seconds": [1.0 * factor] * 3, "peak_bytes": 2**29 + 2**20 * factor**2}
    return {"axis": axis, "factor": factor, "flops": flops, **sizes, **where}


def test_a_record_is_gone_on_with_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "results" / "some.jsonl"
    record = measuring.Record(path, ("case", "round"), resume=False)
    record.add({"case": "a", "round": 0, "seconds": [1.0]})
    again = measuring.Record(path, ("case", "round"), resume=True)
    assert again.has(case="a", round=0) and not again.has(case="a", round=1)
    again.add({"case": "a", "round": 1})
    assert [line["round"] for line in measuring.lines(path)] == [0, 1]
    with pytest.raises(SystemExit, match=r"some\.jsonl: has measurements; --resume goes on with them"):
        measuring.Record(path, ("case", "round"), resume=False)


def test_a_turn_on_record_is_not_run_again(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    body = f"open({str(counts)!r}, 'a').write('x'); print('{{}}')"
    turn = run.Turn("tiny", "grpo", "distillkit", "", 1, (sys.executable, "-c", body))
    for _ in range(2):
        run.go([turn], 2, 1, measuring.Record(tmp_path / "record.jsonl", run._KEY, resume=True))
    assert counts.read_text() == "xx"
    found = measuring.lines(tmp_path / "record.jsonl")
    assert [r["round"] for r in found] == [0, 1]
    assert all(r["peak_bytes"] > 0 and r["load"] >= 0 and r["started"] > 0 for r in found)


@pytest.mark.slow
def test_our_side_of_a_round_is_recorded_with_where_it_ran(tmp_path: Path) -> None:
    record = measuring.Record(tmp_path / "record.jsonl", run._KEY, resume=False)
    run.go([run.ours("tiny", "grpo", 2, "skip_zero_weight=false")], 1, 2, record)
    found = measuring.lines(record.path)[0]
    assert (found["case"], found["method"], found["side"], found["mode"]) == ("tiny", "grpo", "distillkit", "")
    assert (len(found["seconds"]), found["settings"]) == (2, {"skip_zero_weight": False})
    assert set(found["versions"]) == {"torch", "transformers", "distillkit", "lightning"}
    assert found["flops_per_second"] > 1e8 and found["peak_bytes"] > 1e8 and found["threads"] == 2


@pytest.mark.slow
def test_a_switch_and_a_point_are_recorded(tmp_path: Path) -> None:
    for module, more in (
        (switches, ["--only", "zero-weight skipping", "--case", "tiny"]),
        (kinds, ["--cases", "tiny"]),
    ):
        path = tmp_path / f"{module.__name__}.jsonl"
        sizes = ["--rounds", "1", "--steps", "1", "--warm-up", "0"] if module is switches else []
        command = [sys.executable, str(module.__file__), "measure", *more, *sizes, "--record", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert printed.splitlines()[-1].startswith(
            "| zero-weight skipping | " if module is switches else "| tiny | update"
        )
        assert len(measuring.lines(path)) == (2 if module is switches else 1)
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 1 and "has measurements; --resume goes on with them" in again.stderr


def test_a_peak_is_seen_however_short_it_is() -> None:
    plain = measuring.measured([sys.executable, "-c", "import time; time.sleep(0.3); print('{}')"], 1)
    short = measuring.measured([sys.executable, "-c", f"import time; {HOLDS}; time.sleep(0.3); print('{{}}')"], 1)
    assert short["peak_bytes"] - plain["peak_bytes"] == pytest.approx(200e6, rel=0.05)
    assert plain["processes"] == 1


def test_the_memory_of_a_tree_is_that_of_all_its_processes() -> None:
    body = (
        "import subprocess, sys, time; x = bytearray(100_000_000);"
        "y = subprocess.Popen([sys.executable, '-c', 'import time; x = bytearray(200_000_000); time.sleep(1.5)']);"
        "y.wait(); print('{}')"
    )
    found = measuring.measured([sys.executable, "-c", body], 1)
    assert found["processes"] == 2
    assert 300e6 < found["peak_bytes"] < 360e6


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"exit 3\n.*no good"):
        measuring.measured([sys.executable, "-c", "import sys; sys.stderr.write('no good'); sys.exit(3)"], 1)


def test_growth_is_an_exponent_and_a_marginal_cost() -> None:
    linear = growth.Growth.of([12.0, 14.0, 18.0, 26.0])
    assert linear.marginal == pytest.approx(1.0) and linear.exponent < 0.5
    square = growth.Growth.of([1.0, 4.0, 16.0, 64.0])
    assert square.exponent == pytest.approx(2.0) and square.marginal == pytest.approx((48 / 4) / (15 / 3))
    assert growth.Growth.of([4.0, 3.0, 4.0, 6.0]).marginal is None


@pytest.mark.parametrize("axis", growth.AXES)
def test_a_point_of_growth_has_its_size(axis: str) -> None:
    found = growth.point(TINY, axis, 2, steps=1, warm_up=0)
    rollouts = TINY.rollouts * (2 if axis in ("rollouts", "group size") else 1)
    tokens = rollouts * TINY.new_tokens * (2 if axis == "new tokens" else 1)
    assert (found["rollouts"], found["tokens"], len(found["seconds"])) == (rollouts, [tokens], 1)
    assert (found["axis"], found["factor"], found["settings"] != {}) == (axis, 2, axis == "head chunk")
    case, _ = growth.at(TINY, axis, 2)
    least = limit.floor(case, "kdrl", case.new_tokens)
    assert found["flops"] == least.rollout + least.teacher + least.update


def test_the_frameworks_own_time_is_what_the_model_leaves() -> None:
    found = overhead.measure(8, 3, 1)
    assert len(found["seconds"]) == len(found["model"]) == 3
    for whole, model, outside in zip(found["seconds"], found["model"], found["outside"], strict=True):
        assert 0 < model < whole and outside == whole - model
    entries = overhead.entries(8, 2, 1, count=5)
    own = [entry["own_ms"] for entry in entries]
    assert len(own) == 5 and own == sorted(own, reverse=True) and own[-1] > 0


def test_the_fit_of_the_frameworks_time() -> None:
    lines = [{"do": "point", "rollouts": n, "outside": [0.004 + 0.0001 * n]} for n in (1, 8, 64)]
    assert overhead.fit([*lines, {"do": "profile", "rollouts": 8}]) == pytest.approx((0.004, 0.0001))


def test_a_switch_is_set_off_by_its_settings() -> None:
    found = switches.SWITCHES["zero-weight skipping"]
    on, off = (switches.command(found, state, None, 5, 2) for state in ("on", "off"))
    assert off == [*on, "--set", "skip_zero_weight=false"]
    assert on[on.index("--case") + 1] == "sparse"


def test_a_teachers_gap_is_small_and_not_nothing() -> None:
    found = switches.gap("embedded:student", "embedded:teacher", ["1+2>", "3*4>"], group_size=2, new_tokens=8)
    assert 0 < found["mean_gap"] <= found["largest_gap"] < 1
    assert abs(found["bias"]) <= found["mean_gap"] and found["nll"] > 0


def test_phases_are_beside_the_floor_at_the_rate_of_their_own_run(records: dict[str, list[dict[str, Any]]]) -> None:
    found = tables.floors(records["speed"], "tiny", "kdrl")
    assert found is not None
    low, took = found
    own = next(r for r in records["speed"] if r["method"] == "kdrl")
    assert low["rollout"] == limit.floor(TINY, "kdrl", TINY.new_tokens).rollout / own["flops_per_second"]
    assert took["rollout"] == sorted(own["phases"]["rollout"])[1]
    assert sum(took[phase] for phase in ("rollout", "teacher", "update", "rest")) == pytest.approx(took["step"])
    assert all(low[phase] < took[phase] for phase in low)


def test_a_phase_is_parted_by_kind_of_operation(records: dict[str, list[dict[str, Any]]]) -> None:
    assert [kinds.kind(name) for name in ("aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")] == [
        "products", "attention",
    ]  # fmt: skip
    assert [kinds.kind(name) for name in ("aten::_log_softmax", "aten::copy_", "aten::mul", "MmBackward0")] == [
        "softmax and log-probs", "copies", "element-wise", "other",
    ]  # fmt: skip
    found = records["kinds"][0]["shares"]
    assert set(found) == set(kinds.PHASES)
    for row in found.values():
        assert set(row) == {*kinds.KINDS, "other", "between"} and sum(row.values()) == pytest.approx(1.0)
        assert row["products"] > 0 and row["attention"] > 0


def test_every_phase_of_every_case_has_a_reason() -> None:
    known = {"rollout", "teacher", "update", "step"}
    assert known <= set(report.REASONS)
    assert {key.split()[-1] for key in report.REASONS} == known
    assert {key.split()[0] for key in report.REASONS if " " in key} <= set(COMPARED)


def test_the_page_says_what_the_records_say(records: dict[str, list[dict[str, Any]]]) -> None:
    page = report.page(records)
    assert not re.search(r"\{\w*\}", page)
    cells = [line for line in page.splitlines() if line.startswith("| tiny | ")]
    grpo = next(line for line in cells if "grpo (TRL best)" in line).split(" | ")
    assert (*grpo[4:6], *grpo[7:11]) == ("**4.00**", "4.00", "2.00", "1.00", "2.00", "0.50")
    distil = next(line for line in cells if "distil (TRL best)" in line).split(" | ")
    assert distil[4:11] == ["**4.00**", "4.00", "—", "—", "1.00", "2.00", "0.50"]
    assert "**1.50**" in page and page.count("| 2.00 | 3.00 | **1.50** |") == len(switches.SWITCHES)
    assert "| rollouts | step, s | 1.00 | 2.00 | 4.00 | 8.00 | 1.00 | 1.00 | 1.00 | or better |" in page
    assert "| new tokens | memory, GiB | 0.00 | 0.00 | 0.02 | 0.06 | 2.00 | 2.40 |" in page
    assert "| head chunk | step, s | 1.00 | 2.00 | 4.00 | 8.00 | 1.00 | — | — | 8.00 × |" in page
    assert "2027-01-15" in page and f"{records['speed'][0]['flops_per_second'] / 1e9:.0f}" in page


def test_the_same_records_give_the_same_page_and_plots(
    records: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for name, found in records.items():
        (results / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    written = []
    for turn in ("first", "second"):
        docs = tmp_path / turn
        docs.mkdir()
        report.write_report(results, docs)
        written.append({path.name: path.read_bytes() for path in docs.iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"performance.md", *report.PLOTS}
    for name in report.PLOTS:
        ET.fromstring(written[0][name])
        assert name.encode() in written[0]["performance.md"]
    (results / "growth.jsonl").unlink()
    with pytest.raises(SystemExit, match="nothing measured of growth"):
        report.write_report(results, tmp_path)
