"""Lets tests import the phases of `benchmarks/gpu.py`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
