"""Workers as processes: answers, errors, silence, death, and the memory that they took."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from scripted_engines import scripted_engine

from yoco_u.bench.process import WorkerFailed, WorkerProcess, WorkerTimedOut, family

CASE = {"kind": "prefill", "tokens": 5, "depth": 0}
Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    workers = []

    def make(**statements: str) -> WorkerProcess:
        engine = scripted_engine(tmp_path, "engine", **statements)
        workers.append(WorkerProcess(engine.python, engine.script, {"cases": [CASE]}, threads=3))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_answers(start: Start) -> None:
    worker = start(run="assert case == {'kind': 'prefill', 'tokens': 5, 'depth': 0} and os.environ['OMP_NUM_THREADS'] == '3'")
    assert worker.about(60) == {"threads": 3, "cases": [CASE]}
    assert worker.run(CASE, 60)["seconds"] == 0.5


def test_an_error_in_a_case_is_told_and_the_worker_goes_on(start: Start) -> None:
    worker = start(run="assert case['tokens'] < 9, 'too many\\nof them'")
    worker.about(60)
    assert worker.run(CASE | {"tokens": 9}, 60)["error"] == "AssertionError: too many"
    assert worker.run(CASE, 60)["seconds"] == 0.5


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("import nowhere_to_be_found", "No module named"),
        ("print('bang', file=sys.stderr); os._exit(3)", "ended with status 3: bang"),
        ("os.kill(os.getpid(), 9)", "perhaps for lack of memory"),
    ],
)
def test_a_worker_that_cannot_start_says_why(start: Start, statement: str, message: str) -> None:
    with pytest.raises(WorkerFailed, match=message):
        start(start=statement).about(60)


def test_a_silent_worker_is_killed_with_its_children(start: Start) -> None:
    sleeper = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    worker = start(start=sleeper, run="time.sleep(600)")
    worker.about(60)
    processes = family(worker._process.pid)
    assert len(processes) == 2
    with pytest.raises(WorkerTimedOut, match=r"no answer within 0.2 s"):
        worker.run(CASE, 0.2)
    _, left = psutil.wait_procs(processes, 60)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)  # of a container that reaps nothing


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a case are Linux's")
def test_peak_memory_is_that_of_the_case_alone(start: Start) -> None:
    worker = start(run="seconds = len(bytearray(case['tokens']))")
    worker.about(60)
    small = worker.run(CASE, 60)["peak_bytes"]
    large = worker.run(CASE | {"tokens": 200 << 20}, 60)["peak_bytes"]
    again = worker.run(CASE, 60)["peak_bytes"]
    assert large - small == pytest.approx(200 << 20, rel=0.05)
    assert again - small < 10 << 20
