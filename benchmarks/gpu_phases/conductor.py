"""Runs the phases one after the other, each in a process of its own, which is killed when its time is up.

An error inside a kernel breaks the GPU for the process that met it, and for no other: the process ends, and another one goes on
behind the figure that failed. Phases that an earlier call has finished are not run again; what a killed phase has found stays,
and the next call goes on from there.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from gpu_phases.record import BROKEN, Record
from yoco_u.bench.process import family

FOLDER = Path(__file__).parents[1]
MISTAKE = 2
"""Exit status of a phase that ended with a `UserError`, which it has printed."""

_TO_END = 5.0  # seconds at the end, for the result and its table


class Phase(NamedTuple):
    """A part of the benchmark.

    Attributes:
        name: of its module, and of its file.
        most: seconds that it may take.
        least: seconds without which it is not begun.
    """

    name: str
    most: float
    least: float


PHASES = (
    Phase("machine", 100, 5),
    Phase("correctness", 170, 20),
    Phase("tables", 220, 25),
    Phase("profiling", 70, 15),
    Phase("training", 130, 25),
    Phase("peers", 90, 20),
    Phase("text", 480, 60),
)
"""In their order: the most important figures first. Their times are what they may take at most, together more than there is."""


class Conductor:
    """The phases of one call.

    Args:
        out: folder of the phases' files.
        seconds: for all phases together.
        dry: whether phases run at toy size on the CPU.
    """

    def __init__(self, out: Path, seconds: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self._deadline = time.monotonic() + seconds - _TO_END

    def record(self, name: str) -> Record:
        """What a phase has found so far."""
        return Record(self.out / f"{name}.json")

    def run(self, phase: Phase) -> str:
        """Run a phase, unless it is finished.

        Returns:
            How it ended: done, out of time, left out, failed, or mistake.
        """
        if self.record(phase.name).is_done:
            return "done"
        until, status, going_on = min(time.monotonic() + phase.most, self._deadline), BROKEN, False
        while status == BROKEN:
            seconds = until - time.monotonic()
            if seconds < phase.least:
                return "out of time" if going_on else "left out"
            try:
                status = self._process(phase.name, seconds, ["--dry"] * self.dry + ["--go-on"] * going_on)
            except subprocess.TimeoutExpired:
                return "out of time"
            going_on = True
        return {0: "done", MISTAKE: "mistake"}.get(status, "failed")

    def _process(self, name: str, seconds: float, options: list[str]) -> int:
        """Run a phase in a process of its own, which is killed after so many seconds; its exit status."""
        command = [sys.executable, "-m", "gpu_phases", name, str(self.out), str(time.time() + seconds), *options]
        process = subprocess.Popen(command, env=self._environment())
        try:
            return process.wait(seconds)
        finally:
            _kill(process)

    def _environment(self) -> dict[str, str]:
        """The environment of a phase, which finds this package, yoco_u, and what this process finds besides."""
        paths = [str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        return found | ({"CUDA_VISIBLE_DEVICES": ""} if self.dry else {})


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a phase and the processes that it has started, if they have not ended."""
    for one in family(process.pid):
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()
