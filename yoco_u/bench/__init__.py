"""The benchmark: how fast our engine and its peers prefill and decode, and how much memory they take.

In go `BenchSettings` (`cases.py`) and the engines to measure (`engines.py`); out comes a `Measurement`, which is told as
tables, JSON or PNG: tokens per second, shares of what the machine can do at most, ratios between engines. Every engine runs in
a process of its own, by a script in `workers/`. Start at `run.py`, which says who is measured when.
"""
