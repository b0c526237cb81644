"""Grids of runs: planned from one file, trained one after another or by a scheduler's tasks, judged over their seeds."""
