"""The paper's findings, and what a grid of runs says about each of them.

The `Results` of a grid go in. An `Outcome` of every finding comes out: a verdict (confirmed, not confirmed, or not decidable at
this scale), a text, and the numbers. Start at `claims.py`, the list of the findings. Each names its test, a function in one
of the other files.
"""
