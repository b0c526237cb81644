"""The report on one run or more: one self-contained HTML page that compares them.

Runs, as `yoco_u.training.run_folder.read_run` reads them, go in. A `Comparison` comes out, and a page with curves, samples and
settings. Start at `comparison.py`, which computes the numbers; `run_report.py` makes the page, and `plots.py` draws its plots.
`page.py` renders the templates of this folder, for the reports of experiments and analyses too.
"""
