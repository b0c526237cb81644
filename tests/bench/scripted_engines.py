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
        return {{"seconds": seconds, **{answer}}}
    return run, {{"threads": job["threads"], "cases": job["cases"]}}

serve(start)
"""


def scripted_engine(
    folder: Path, name: str, start: str = "pass", run: str = "pass", architecture: str = "transformer", answer: str = "{}"
) -> BenchEngine:
    """An engine whose worker runs these statements when it starts, and before it answers a case with half a second.

    Args:
        answer: what else it answers, as an expression. An engine that answers with memory of a GPU believes to be on one.
    """
    script = folder / f"{name}.py"
    script.write_text(SCRIPT.format(workers=str(WORKERS), start=start, run=run, answer=answer), encoding="utf-8")
    job = {"device": "cuda:0"} if "gpu" in answer else {}
    return BenchEngine(name, preset(architecture, "test"), sys.executable, script, job)
