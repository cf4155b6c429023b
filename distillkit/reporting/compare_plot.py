"""`compare.png`: the learning curves of a comparison, a band over the seeds of each group."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distillkit.reporting.compare import Comparison, Group, Spread
from distillkit.reporting.files import write_atomically

__all__ = ["comparison_figure", "group_curve", "write_comparison_plot"]


def write_comparison_plot(comparison: Comparison, path: Path) -> None:
    """Draw a comparison into a PNG file, atomically."""
    image = io.BytesIO()
    comparison_figure(comparison).savefig(image, format="png", dpi=120, metadata={"Software": "distillkit"})
    write_atomically(path, image.getvalue())


def group_curve(group: Group, metric: str) -> dict[int, Spread]:
    """Return step -> spread over a group's runs, at the steps that all of them have evaluated.

    A mean over whichever runs are still going would jump where one ends.
    """
    curves = [run.curve(metric) for run in group.runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: Spread.of([curve[step] for curve in curves]) for step in common}


def comparison_figure(comparison: Comparison) -> Figure:
    """Return the figure: each group's mean by step, a band of one standard deviation to either side."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, group in enumerate(comparison.groups):
        color = colormaps["tab10"](number % 10)
        style = ("-", "--", ":")[number // 10 % 3]
        curve = group_curve(group, comparison.metric)
        steps = list(curve)
        means = np.array([spread.mean for spread in curve.values()])
        count = len(group.runs)
        label = f"{group.label} ({count} run{'' if count == 1 else 's'})"
        axes.plot(steps, means, style, color=color, marker="o", markersize=3.5, label=label)
        if count > 1:
            widths = np.array([spread.deviation or 0.0 for spread in curve.values()])
            axes.fill_between(steps, means - widths, means + widths, color=color, alpha=0.15, linewidth=0)
    axes.set_title(f"{comparison.metric} on {comparison.set_name}: mean and standard deviation over runs")
    axes.set_xlabel("step (one batch of rollouts each)")
    axes.set_ylabel(comparison.metric)
    axes.grid(True, alpha=0.3)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize="small", frameon=False)
    return figure
