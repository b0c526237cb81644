"""The text comparison of `recipes/gpu-text.yaml`, YOCO-U against YOCO: several processes on the one GPU, while time is left.

Of the recipe only the runs of 20 tokens for each parameter, which minutes may suffice for.

Runs that are under way when the time is up keep a checkpoint, so the same folder can go on in a later call.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_phases.record import LEFT_OUT, Figure, Record
from gpu_phases.scale import Scale
from yoco_u.files import read_json

RECIPE = Path(__file__).parents[2] / "recipes" / "gpu-text.yaml"
JOBS = 4
FEWEST = "tokens_per_parameter=[20]"
_UNFINISHED = "not finished: "  # how the command's lines begin that name such a run
_TO_REPORT = 75.0  # seconds that runs may take to stop, and the report to be written


def run(record: Record, scale: Scale) -> None:
    folder = record.path.parent / "text"
    if scale.device == "cpu":
        record.measure("runs", lambda: _call(folder, ["--list"]))
        return
    record.repeat("runs", "report")  # of an earlier call, whose runs may not have been finished
    minutes = max(0.0, record.remaining - _TO_REPORT) / 60
    record.measure("runs", lambda: _call(folder, ["--jobs", str(JOBS), "--minutes", f"{minutes:.2f}"]))
    if (folder / "report.json").exists():
        record.measure("report", lambda: {"report": read_json(folder / "report.json", dict[str, Any])})


def _call(folder: Path, options: list[str]) -> Figure:
    """Run the grid as a user would.

    Raises:
        RuntimeError: if it fails, with the last line of what it said.
    """
    command = [sys.executable, "-m", "yoco_u.cli", "experiment", str(RECIPE), FEWEST, "--out", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if done.returncode:
        raise RuntimeError(lines[-1] if lines else f"ended with status {done.returncode}")
    unfinished = [line for line in lines if line.startswith(_UNFINISHED)]
    left_out = {"failure": f"{LEFT_OUT}: {len(unfinished)} runs are not finished"} if unfinished else {}
    return {"lines": lines[-40:], **left_out}
