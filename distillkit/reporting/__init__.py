"""What a person reads of a run: the folder it leaves behind and the screen while it works.

    files.py       atomic writes, shortest float32
    metrics.py     `MetricsCSV`, the logger behind `metrics.csv`; `read_metrics`, `summarize_metric`
    rollouts.py    `write_rollouts` -> `rollouts/step-000012.jsonl`, `read_rollouts`
    plots.py       `write_plots` -> `plots/*.png`, where drawing.py finds matplotlib (`distillkit plot RUN...`)
    screen.py      the step as one sentence, decoded rollouts, the last line
    progress.py    `StepProgress`, the progress bar
    viewer.py      `distillkit rollouts RUN`
    compare.py     `compare_runs`: seeds grouped, results, intervals; read by compared_runs.py, shown by
                   compare_report.py and compare_plot.py (`distillkit compare RUN...`)
    run_folder.py  the folder itself: what lies where, its status and its lock
    run_report.py  `RunReport`, the Lightning callback around all of these

The formats are described in `docs/run_folder.md`. To add a plot: one `_Plot` in `plots.py`. Nothing is imported here.
"""
