"""plots/*.png: valid pictures of just the series that there are."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from distillkit.errors import DataError
from distillkit.reporting import plots
from distillkit.reporting.metrics import MetricsCSV, MetricsRow, read_metrics
from distillkit.reporting.plots import write_plots

TRAIN = {
    "train/reward": 0.5,
    "train/reward/answer": 0.25,
    "train/divergence": 0.4,
    "train/beta": 0.2,
    "train/completion_length": 31.0,
    "train/truncated": 0.1,
    "time/rollout": 0.2,
    "time/update": 0.3,
    "time/step": 0.6,
    "tokens_per_second/step": 2000.0,
}
VALIDATION = {"val/held_out/pass@1": 0.5, "val/held_out/maj@8": 0.6, "val/held_out/truncated": 0.1}


def write(folder: Path, *rows: dict[str, float]) -> Path:
    logger = MetricsCSV(folder=folder)
    for step, row in enumerate(rows):
        logger.log_metrics(row, step=step)
    return logger.path


@pytest.mark.parametrize("steps", [1, 60])
def test_all_plots_are_pictures(tmp_path: Path, steps: int) -> None:
    metrics = write(tmp_path, *[{k: v * (1 + s % 3) / 3 for k, v in TRAIN.items()} | VALIDATION for s in range(steps)])
    written = write_plots(metrics, tmp_path / "plots")
    assert [p.stem for p in written] == ["reward", "divergence", "length", "accuracy", "phase_times"]
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(p.name for p in written)
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] == 960
        colours = (pixels[..., :3] * 255).astype(np.int64) @ np.array([1, 256, 256**2])
        assert len(np.unique(colours)) > 20


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"train/reward": 1.0}, ["reward"]),
        ({"train/divergence": 0.1}, ["divergence"]),
        ({"train/reference_divergence": 0.1}, ["divergence"]),
        ({"train/completion_length": 4.0}, ["length"]),
        ({"val/a/mean@4": 0.1, "val/a/length": 9.0}, ["accuracy"]),
        ({"time/rollout": 0.1}, ["phase_times"]),
        ({"time/step": 0.1, "train/beta": 0.1, "train/truncated": 0.0, "lr": 1.0}, []),
        ({"train/reward": math.nan, "train/divergence": math.inf}, []),
    ],
)
def test_only_plots_with_data_are_drawn(tmp_path: Path, row: dict[str, float], names: list[str]) -> None:
    assert [p.stem for p in write_plots(write(tmp_path, row), tmp_path / "plots")] == names


def test_the_curves_are_the_numbers_and_the_axes_are_named(tmp_path: Path) -> None:
    rows = read_metrics(
        write(
            tmp_path,
            {"val/b/pass@1": 0.25, "val/a/pass@1": 0.5},
            {"train/completion_length": 10.0},
            {"val/a/pass@1": 0.75, "train/completion_length": 12.0, "train/truncated": 0.5},
        )
    )
    accuracy = plots._curves(next(p for p in plots._PLOTS if p.name == "accuracy"), rows)
    assert accuracy is not None
    (axes,) = accuracy.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert drawn == {"val/b/pass@1": ([0], [0.25]), "val/a/pass@1": ([0, 2], [0.5, 0.75])}
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["val/b/pass@1", "val/a/pass@1"]
    assert (axes.get_title(), axes.get_ylabel()) == ("Accuracy on the evaluation sets", "share of problems")
    assert axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] >= 1

    length = plots._curves(next(p for p in plots._PLOTS if p.name == "length"), rows)
    assert length is not None
    upper, lower = length.axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("tokens per rollout", "share cut off")
    assert lower.get_xlabel() == "step (one batch of rollouts each)"
    assert list(upper.get_lines()[0].get_ydata()) == [10, 12]


def test_phases_are_stacked_in_the_order_of_the_step_without_the_whole(tmp_path: Path) -> None:
    rows = [
        MetricsRow(step=1, values={"time/update": 0.3, "time/rollout": 0.2, "time/step": 0.7, "time/sync": 0.0}),
        MetricsRow(step=3, values={"time/update": 0.4, "time/rollout": 0.1, "time/validation": 2.0}),
    ]
    figure = plots._phase_times(rows)
    assert figure is not None
    (axes,) = figure.axes
    bars = {c.get_label(): [(b.get_x() + 0.4, b.get_y(), b.get_height()) for b in c] for c in axes.containers}
    assert {k: [tuple(round(x, 6) for x in b) for b in v] for k, v in bars.items()} == {
        "rollout": [(1, 0, 0.2), (3, 0, 0.1)],
        "update": [(1, 0.2, 0.3), (3, 0.1, 0.4)],
        "validation": [(1, 0.5, 0), (3, 0.5, 2.0)],
    }
    (whole,) = axes.get_lines()
    assert whole.get_label() == "whole step" and list(whole.get_ydata()) == [0.7]
    assert axes.get_ylabel() == "seconds per step"


def test_a_long_curve_is_drawn_as_its_running_mean() -> None:
    assert plots._running_mean([0, 3, 6, 0, 3], 3) == [1.5, 3, 3, 3, 1.5]
    rows = [MetricsRow(step=s, values={"train/reward": float(s % 2)}) for s in range(100)]
    figure = plots._curves(plots._PLOTS[0], rows)
    assert figure is not None
    pale, mean = figure.axes[0].get_lines()
    assert pale.get_alpha() == 0.25 and list(pale.get_ydata()) == [float(s % 2) for s in range(100)]
    assert mean.get_label() == "train/reward (mean of 5)" and min(mean.get_ydata()) >= 0.25


def test_plots_are_drawn_again_over_old_ones_and_a_missing_file_is_named(tmp_path: Path) -> None:
    metrics = write(tmp_path, {"train/reward": 1.0})
    (path,) = write_plots(metrics, tmp_path / "plots")
    before = path.read_bytes()
    MetricsCSV(folder=tmp_path).log_metrics({"train/reward": 0.0}, step=5)
    write_plots(metrics, tmp_path / "plots")
    assert path.read_bytes() != before
    with pytest.raises(DataError, match="no such file"):
        write_plots(tmp_path / "missing.csv", tmp_path / "plots")


def test_no_global_state_of_pyplot_is_touched(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums(), matplotlib.rcParams.copy()
    write_plots(write(tmp_path, {"train/reward": 1.0, "time/rollout": 1.0}), tmp_path / "plots")
    assert (pyplot.get_fignums(), matplotlib.rcParams.copy()) == before
