"""`plots/*.png`: the curves of a run, drawn from `metrics.csv` alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distillkit.reporting.files import write_atomically
from distillkit.reporting.metrics import MetricsRow, read_metrics

__all__ = ["write_plots"]

_Points = tuple[list[int], list[float]]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One pair of axes: the metrics whose whole name matches `pattern`, their unit, the least range shown."""

    pattern: str
    label: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """One file: panels over a common step axis; it is drawn when its first panel has data."""

    name: str
    title: str
    panels: tuple[_Panel, ...]


_PLOTS = (
    _Plot(
        name="reward",
        title="Reward of the student's rollouts",
        panels=(_Panel(pattern=r"train/reward(/.*)?", label="mean reward per rollout"),),
    ),
    _Plot(
        name="divergence",
        title="Divergence from the teacher",
        panels=(
            _Panel(pattern=r"train/(reference_)?divergence", label="nats per token"),
            _Panel(pattern=r"train/beta", label="weight β", low=0.0),
        ),
    ),
    _Plot(
        name="length",
        title="Length of the completions",
        panels=(
            _Panel(pattern=r"train/completion_length", label="tokens per rollout"),
            _Panel(pattern=r"train/truncated", label="share cut off", low=0.0),
        ),
    ),
    _Plot(
        name="accuracy",
        title="Accuracy on the evaluation sets",
        panels=(_Panel(pattern=r"val/.+/(pass|mean|maj)@\d+", label="share of problems", low=0.0, high=1.0),),
    ),
)

_PHASES = ("sync", "rollout", "reward", "teacher", "reference", "old_policy", "update")
"""From the bottom of the stack; others come on top."""

_SMOOTH_FROM = 40
"""From so many points on a curve is drawn as its running mean, with the points pale behind it."""


def write_plots(metrics_csv: str | Path, folder: str | Path) -> tuple[Path, ...]:
    """Draw `reward`, `divergence`, `length`, `accuracy` and `phase_times` as PNG files into `folder`.

    A plot without data is not drawn. The files are replaced atomically, so this may be called again as a run goes on.

    Returns:
        The files written.

    Raises:
        DataError: there is no such `metrics.csv`, or it is not one.
    """
    rows = read_metrics(metrics_csv)
    figures = [(plot.name, _curves(plot, rows)) for plot in _PLOTS] + [("phase_times", _phase_times(rows))]
    written = []
    for name, figure in figures:
        if figure is not None:
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=120, metadata={"Software": "distillkit"})
            path = Path(folder) / f"{name}.png"
            write_atomically(path, image.getvalue())
            written.append(path)
    return tuple(written)


def _series(rows: Sequence[MetricsRow], pattern: str) -> dict[str, _Points]:
    """Finite values by metric name, in the order of first appearance."""
    found: dict[str, _Points] = {}
    for row in rows:
        for name, value in row.values.items():
            if re.fullmatch(pattern, name) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row.step)
                values.append(value)
    return found


def _curves(plot: _Plot, rows: Sequence[MetricsRow]) -> Figure | None:
    panels = [(panel, _series(rows, panel.pattern)) for panel in plot.panels]
    if not panels[0][1]:
        return None
    panels = [(panel, series) for panel, series in panels if series]
    figure, all_axes = _figure(plot.title, [3.0] + [1.2] * (len(panels) - 1))
    for axes, (panel, series) in zip(all_axes, panels, strict=True):
        for number, (name, points) in enumerate(series.items()):
            _curve(axes, name, points, number)
        axes.set_ylabel(panel.label)
        axes.update_datalim([(next(iter(series.values()))[0][0], y) for y in (panel.low, panel.high) if y is not None])
        axes.autoscale_view()
        if len(series) > 1:
            _legend(axes)
    return figure


def _curve(axes: Axes, name: str, points: _Points, number: int) -> None:
    steps, values = points
    color = colormaps["tab10"](number % 10)
    style = ("-", "--", ":")[number // 10 % 3]
    if len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, style, color=color, marker="o", markersize=3.5, label=name)
        return
    axes.plot(steps, values, style, color=color, alpha=0.25, linewidth=0.8)
    window = max(5, len(values) // 30 | 1)
    axes.plot(steps, _running_mean(values, window), style, color=color, label=f"{name} (mean of {window})")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` (odd) points around each; at the ends over those that there are."""
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def _phase_times(rows: Sequence[MetricsRow]) -> Figure | None:
    series = {name: points for name, points in _series(rows, r"time/.+").items() if any(points[1])}
    total = series.pop("time/step", None)
    steps = sorted({step for points in series.values() for step in points[0]})
    if not steps:
        return None
    at = {name: dict(zip(*series[name], strict=True)) for name in sorted(series, key=_phase_order)}
    heights = [[values.get(step, 0.0) for step in steps] for values in at.values()]
    figure, (axes,) = _figure("Time of each phase of a step", [3.0])
    colors = [colormaps["tab20"](i % 20) for i in range(len(heights))]
    names = [name.removeprefix("time/") for name in at]
    if len(steps) < _SMOOTH_FROM:
        bottom = [0.0] * len(steps)
        for name, height, color in zip(names, heights, colors, strict=True):
            axes.bar(steps, height, bottom=bottom, width=0.8, label=name, color=color)
            bottom = [low + high for low, high in zip(bottom, height, strict=True)]
    else:
        axes.stackplot(steps, heights, labels=names, colors=colors, linewidth=0)
    if total is not None:
        axes.plot(*total, color="black", linewidth=0.8, label="whole step")
    axes.set_ylabel("seconds per step")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    _legend(axes, top_first=True)
    return figure


def _phase_order(name: str) -> tuple[int, str]:
    phase = name.removeprefix("time/")
    return (_PHASES.index(phase) if phase in _PHASES else len(_PHASES)), name


def _figure(title: str, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8, 1.2 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    all_axes = list(grid[:, 0])
    all_axes[0].set_title(title)
    all_axes[-1].set_xlabel("step (one batch of rollouts each)")
    for axes in all_axes:
        axes.grid(True, alpha=0.3)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, all_axes


def _legend(axes: Axes, *, top_first: bool = False) -> None:
    """Beside the axes, where it covers no curve; with the highest of a stack first."""
    beside = {"bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axes.legend(loc="upper left", fontsize="small", frameon=False, reverse=top_first, **beside)
