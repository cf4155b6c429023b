"""`docs/reproduction.md` and its plots, from the results alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from reproduction.claims import CLAIMS, judge
from reproduction.methods import METHODS, SEEDS, TUNING_SEED

__all__ = ["write_report"]

_THRESHOLD = 0.8
_PANELS = {
    "baselines": ("grpo", "sft", "sft_then_rl", "offline_kd", "kd_rkl", "opd_then_rl"),
    "KDRL: estimators": ("kdrl_k2", "kdrl_k3", "kdrl_topk", "kdrl_reward_shaping"),
    "KDRL: schedule and masks": ("kdrl_k2", "kdrl_annealed", "kdrl_response_mask", "kdrl_group_mask"),
    "RLAD and RLKD": ("grpo", "rlad_alpha_03", "rlad_alpha_05", "rlad_alpha_07", "rlad_alpha_10", "rlkd"),
}

_PAGE = Path(__file__).with_name("page.md")
_READING = Path(__file__).with_name("reading.md")


def write_report(rows: Sequence[Mapping[str, Any]], docs: Path, budget: int) -> None:
    """Write the page and its plots into `docs`.

    Raises:
        SystemExit: runs are missing.
    """
    seconds = {(r["method"], r["seed"]): r["seconds"] for r in rows if r["phase"] == "time"}
    whole = {(r["method"], r["seed"]): r for r in rows if r["phase"] == "run"}
    wanted = [(name, seed) for name in METHODS for seed in SEEDS]
    for phase, found in (("run", whole), ("time", seconds)):
        if missing := [f"{name} seed {seed}" for name, seed in wanted if (name, seed) not in found]:
            raise SystemExit(f"{len(missing)} missing, such as {', '.join(missing[:3])}: `reproduce.py {phase}` first")
    runs = {name: [{**whole[name, s], "step_seconds": seconds[name, s]} for s in SEEDS] for name in METHODS}
    start = runs["grpo"][0]["curve"][0][3]
    gain = 100 * (statistics.mean(r["accuracy"] for r in runs["grpo"]) - start)
    seeds = ", ".join(map(str, SEEDS))
    page = _PAGE.read_text().format(
        start=start,
        budget=budget,
        tuning=TUNING_SEED,
        seeds=seeds,
        gain=gain,
        threshold=_THRESHOLD,
        results=_results(runs),
        verdicts=_verdicts(runs),
        trials=_trials(rows),
        reading=_READING.read_text().strip(),
    )
    (docs / "reproduction.md").write_text(page)
    _plot(runs, docs / "reproduction.png")


def _spread(values: Iterable[float], digits: int = 3) -> str:
    found = list(values)
    return f"{statistics.mean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def _results(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    heads = (
        "method",
        "accuracy",
        "sampled",
        "length",
        f"steps to {_THRESHOLD}",
        "teacher KL",
        "alignment",
        "paths",
        "s/step",
    )
    lines = []
    for name, method in METHODS.items():
        found = runs[name]
        reached = [next((point[0] for point in r["curve"] if point[2] >= _THRESHOLD), None) for r in found]
        known = [step for step in reached if step is not None]
        lines.append(
            (
                method.title,
                _spread(r["accuracy"] for r in found),
                _spread(r["sampled_accuracy"] for r in found),
                _spread((r["length"] for r in found), 2),
                _spread(known, 0) if len(known) == len(found) else "—",
                _spread(r["teacher_reverse_kl"] for r in found),
                _spread(statistics.mean(r["aligned"]) for r in found),
                _spread((r["paths"] for r in found), 2),
                f"{statistics.median(r['step_seconds'] for r in found):.2f}",
            )
        )
    return _table(heads, lines)


def _verdicts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for claim in CLAIMS:
        found = judge(claim, runs)
        interval = "" if found.interval is None else f" [{found.interval[0]:+.3f}, {found.interval[1]:+.3f}]"
        seeds = ", ".join(f"{value:+.3f}" for value in found.by_seed)
        pair = f"{METHODS[claim.first].title} − {METHODS[claim.second].title}"
        lines.append((claim.source, claim.text, pair, f"{found.difference:+.3f}{interval}", seeds, f"**{found.word}**"))
    return _table(("source", "claim", "here", "difference [95 %]", "by seed", "verdict"), lines)


def _trials(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name, method in METHODS.items():
        trials = [r for r in rows if r["phase"] == "tune" and r["method"] == name]
        best = max(trials, key=lambda r: (r["validation"], r["area"]))
        cells = []
        for row in trials:
            values = ", ".join(f"{path.split('.')[-1]} {value:g}" for path, value in row["trial"].items())
            text = f"{values}: {row['validation']:.3f}"
            cells.append(f"**{text}**" if row is best else text)
        lines.append((method.title, *cells))
    return _table(("method", "trial 1", "trial 2", "trial 3", "trial 4"), lines)


def _plot(runs: Mapping[str, Sequence[Mapping[str, Any]]], target: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for axis, (title, names) in zip(axes.flat, _PANELS.items(), strict=True):
        for name in names:
            curves = [r["curve"] for r in runs[name]]
            points = list(zip(*curves, strict=False))
            tokens = [statistics.mean(p[1] for p in point) for point in points]
            accuracy = [[p[3] for p in point] for point in points]
            [line] = axis.plot(tokens, [statistics.mean(a) for a in accuracy], label=METHODS[name].title)
            axis.fill_between(
                tokens, [min(a) for a in accuracy], [max(a) for a in accuracy], alpha=0.15, color=line.get_color()
            )
        axis.set_title(title)
        axis.legend(loc="lower right", fontsize=8)
        axis.grid(alpha=0.3)
    figure.supxlabel("completion tokens")
    figure.supylabel("held-out accuracy (mean and range over seeds)")
    figure.savefig(target, dpi=110)
    plt.close(figure)
