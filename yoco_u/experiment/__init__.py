"""Experiments: grids of runs, trained from one YAML file and judged by the paper's findings.

An `Experiment` (the file, parsed) and a folder go in. A run folder for each run comes out, and a report on all of them:
report.html, report.json and report.png. The way is straight: `expand` makes the runs of the grid, `train_runs` trains them,
`read_results` reads their folders, `summarize` judges the findings, `write_report` writes the report.

Start at `config.py`, which says what a file may hold, and `grid.py`, which makes runs of it. `findings/` holds the paper's
statements with the test of each, `intervals.py` the statistics, `plots.py` the drawing.
"""
