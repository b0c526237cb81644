"""The phases of `benchmarks/gpu.py`. Each is a module with a function `run(record, scale)`, and runs in a process of its own.

Start at `conductor.py`, which runs one after the other; `scale.py` says how large everything is that they measure, `record.py`
keeps what they find, and `report.py` sets it beside the targets of `targets.py`.
"""
