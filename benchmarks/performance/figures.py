"""The plots of docs/performance.md as SVG: the same file for the same records."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from growth import AXES, FACTORS, growths
from limit import METHODS
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from performance.tables import floors, side

__all__ = ["growth_plot", "steps_plot"]

_COLORS = {"rollout": "#4477aa", "teacher": "#ccbb44", "update": "#228833", "rest": "#bbbbbb", "TRL": "#ee6677"}


def steps_plot(results: Sequence[dict[str, Any]]) -> bytes:
    """Draw every step stacked by phase beside TRL's, whole, with our floor as a line."""
    cases = [case for case in dict.fromkeys(r["case"] for r in results) if floors(results, case, "grpo")]
    figure = Figure(figsize=(3.2 * max(len(cases), 2), 4.2), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        _steps(axes, results, case)
    figure.axes[0].set_ylabel("seconds per step (median)")
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return _svg(figure)


def _steps(axes: Axes, results: Sequence[dict[str, Any]], case: str) -> None:
    theirs = {method: side(results, case=case, method=method, side="trl") for method in ("grpo", "distil")}
    ticks = []
    for at, method in enumerate(METHODS):
        found = floors(results, case, method)
        if found is None:
            continue
        low, took = found
        bottom = 0.0
        for phase in ("rollout", "teacher", "update", "rest"):
            axes.bar(at - 0.2, took[phase], 0.36, bottom=bottom, color=_COLORS[phase], label=phase)
            bottom += took[phase]
        axes.hlines(low["step"], at - 0.4, at, color="black", linewidth=1.5, label="floor")
        ticks.append((at, method))
        others = [theirs[name] for name in (("grpo", "distil") if method == "kdrl" else (method,))]
        bottom = 0.0
        for number, other in enumerate(others if None not in others else ()):
            assert other is not None
            axes.bar(
                at + 0.2, other[0].median, 0.36, bottom=bottom, color=_COLORS["TRL"], label="TRL",
                hatch="//" if number else None, edgecolor="white", linewidth=0.0,
            )  # fmt: skip
            bottom += other[0].median
    axes.set_title(case)
    axes.set_xticks([at for at, _ in ticks], [method for _, method in ticks])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def growth_plot(results: Sequence[dict[str, Any]]) -> bytes:
    """Draw seconds and memory of each axis over its factor, both scales logarithmic, with a line of slope 1."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = (("seconds", 1.0, "seconds per step (median)"), ("bytes", 2.0**30, "peak memory above the imports, GiB"))
    for axes, (name, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        lowest = []
        for axis in AXES:
            found = growths(results, axis)[name]
            values = [value / unit for value in found.values]
            lowest.append(values[0])
            axes.plot(FACTORS, values, marker="o", markersize=3.5, label=f"{axis} ({found.exponent:.2f})")
        axes.plot(FACTORS, [max(lowest) * factor for factor in FACTORS], ":", color="black", label="linear (1)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(FACTORS, [f"×{factor}" for factor in FACTORS])
        axes.set_ylabel(label)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize="small", frameon=False, title="exponent")
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "distillkit", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None, "Creator": None})
    return image.getvalue()
