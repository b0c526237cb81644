"""The paper's findings, and what a grid of runs says about each of them. Start at `claims.py`."""
