"""Engines whose workers are scripts of a few lines, so that any course of a benchmark can be tested in a moment."""

import sys
from pathlib import Path

from yoco_u.architecture import preset
from yoco_u.bench.engines import WORKERS, BenchEngine

SCRIPT = """\
import os, sys, time
sys.path.insert(0, {workers!r})
from worker_protocol import serve

def start(job):
    print("chatter on stdout")
    {start}
    def run(case):
        seconds = 0.5
        {run}
        return {{"seconds": seconds}}
    return run, {{"threads": job["threads"], "cases": job["cases"]}}

serve(start)
"""


def scripted_engine(
    folder: Path, name: str, start: str = "pass", run: str = "pass", architecture: str = "transformer"
) -> BenchEngine:
    """An engine whose worker runs these statements when it starts, and before it answers a case with half a second."""
    script = folder / f"{name}.py"
    script.write_text(SCRIPT.format(workers=str(WORKERS), start=start, run=run), encoding="utf-8")
    return BenchEngine(name, preset(architecture, "test"), sys.executable, script, {})
