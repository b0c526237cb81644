"""Whatever happens while processes are started, none goes on alone."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yoco_u.errors import UserError
from yoco_u.experiment import jobs
from yoco_u.experiment.run import claim_experiment

COUNT = 3


class Starts(list[subprocess.Popen[bytes]]):
    """The processes that were started, which would run for long, and what happens before and after a start."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def start(self, *_: Any, **settings: Any) -> subprocess.Popen[bytes]:
        self.before()
        self.append(subprocess.Popen(["sleep", "1000"], **settings))
        self.after()
        return self[-1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Starts:
    found = Starts()
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": found.start}))
    return found


def signals() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("at", range(1, COUNT + 1))
def test_all_end_if_one_cannot_be_started(at: int, started: Starts, tmp_path: Path) -> None:
    def fail() -> None:
        if len(started) == at - 1:
            raise OSError(11, "Resource temporarily unavailable")

    started.before = fail
    with pytest.raises(OSError, match="Resource"):
        jobs.run_jobs(["plan"], COUNT, tmp_path, minutes=None)
    assert [process.poll() for process in started] == [-signal.SIGTERM] * (at - 1)


@pytest.mark.parametrize("at", range(1, COUNT + 1))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_end_if_a_signal_comes_while_they_are_started(
    number: int, at: int, started: Starts, heard: None, tmp_path: Path
) -> None:
    """Even just when a process has been started that nobody knows of yet."""
    before = signals()
    started.after = lambda: os.kill(os.getpid(), number) if len(started) == at else None
    with pytest.raises(KeyboardInterrupt):
        jobs.run_jobs(["plan"], COUNT, tmp_path, minutes=None)
    assert [process.poll() for process in started] == [-signal.SIGTERM] * COUNT
    assert signals() == before


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_something_in_the_place_of_a_log_is_refused_before_any_is_started(
    make: Callable[[Path], None], started: Starts, tmp_path: Path
) -> None:
    claim_experiment(tmp_path)
    make(tmp_path / "job-2.log")
    with pytest.raises(UserError, match=r"job-2\.log: is no regular file; move it elsewhere"):
        jobs.run_jobs(["plan"], COUNT, tmp_path, minutes=None)
    assert not started
