"""docs/performance.md: its tables, plots and text, from the records alone."""
