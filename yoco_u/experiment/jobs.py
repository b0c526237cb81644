"""Trains the runs of a grid in several processes at once, for as long as is allowed.

Small models leave a GPU idle between their kernels; several processes fill it. Every process goes through all runs and passes
over those that are finished or that another one is training, so none waits for work while there is a run left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from yoco_u.errors import UserError
from yoco_u.training.signals import noting_signals

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0
"""How long a process may take to write its checkpoint once it is asked to stop; then it is killed."""

_INTERRUPTED = 130  # the exit status of a command that stopped in good order


def run_jobs(
    arguments: Sequence[str], jobs: int, folder: Path, minutes: float | None, watch: Callable[[], None] = lambda: None
) -> bool:
    """Start `jobs` processes of the command, and wait until they end or the time is over.

    When the time is over, or when this process is asked to stop, each process stops with a checkpoint of its run. What it
    prints goes to the end of `folder`/job-N.log. On a CPU the processes share the cores, unless OMP_NUM_THREADS is set.

    Args:
        arguments: those of `yoco-u`, the command included.
        folder: of the experiment, see `yoco_u.experiment.run.claim_experiment`.
        minutes: how long the processes may run; None for no limit.
        watch: called again and again while they run.

    Returns:
        Whether all processes came to their end before the time was over.

    Raises:
        UserError: if a process failed, with the last line that it printed, or if something else is in the place of a log.
        KeyboardInterrupt: if this process is asked to stop, once all others have.
    """
    logs = [folder / f"job-{number}.log" for number in range(1, jobs + 1)]
    for log in logs:
        if os.path.lexists(log) and not log.is_file():
            raise UserError(f"{log}: is no regular file; move it elsewhere")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    processes: list[subprocess.Popen[bytes]] = []
    noted: list[int] = []  # instead of an exception, which may come between a process and its name
    with noting_signals(noted, once=False):
        try:
            for log in logs:
                processes.append(_start(arguments, jobs, log))
            in_time = _wait(processes, deadline, watch, noted)
        finally:
            _stop(processes)
    if noted:
        raise KeyboardInterrupt
    asked_to_stop = set() if in_time else {_INTERRUPTED, -signal.SIGTERM, -signal.SIGKILL}
    for process, log in zip(processes, logs, strict=True):
        if process.returncode not in {0} | asked_to_stop:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"exit status {process.returncode}")
            raise UserError(f"{log}: this process failed: {last.strip().removeprefix('error: ')}")
    return in_time


def _start(arguments: Sequence[str], jobs: int, log: Path) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "yoco_u.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads} | os.environ,
            start_new_session=True,  # Ctrl-C comes to this process alone: a second signal would end a run without a checkpoint
        )


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], deadline: float | None, watch: Callable[[], None], noted: Sequence[int]
) -> bool:
    """Whether all processes ended before the deadline, and before a signal."""
    while any(process.poll() is None for process in processes):
        if noted or (deadline is not None and time.monotonic() >= deadline):
            return False
        watch()
        time.sleep(_POLL_SECONDS)
    watch()
    return True


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to stop, and kill what does not stop in time."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
