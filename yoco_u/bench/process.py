"""The process of a worker: it is started, asked case by case, killed if it takes too long, and its peak memory is read."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

import yoco_u


class WorkerFailed(Exception):  # noqa: N818
    """The worker has ended or could not start its engine; the message says why, in one line."""


class WorkerTimedOut(WorkerFailed):
    """The worker did not answer in time and was killed."""


class WorkerProcess:
    """The process in which a worker runs one engine. Once it has raised `WorkerFailed` it has ended, and is of no further use.

    Args:
        python: interpreter that runs the worker.
        script: the worker, one of `yoco_u/bench/workers`.
        job: what the worker is told first, see `worker_protocol`; `folder` and `threads` are added here.
        threads: how many CPU threads the engine may use.
    """

    def __init__(self, python: str, script: Path, job: dict[str, Any], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="yoco-u-bench-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        self._log = (folder / "stderr").open("w+", encoding="utf-8", errors="replace")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment.pop("GOMP_SPINCOUNT", None)  # our package sets it for itself; peers run as their users run them
        environment["PYTHONPATH"] = _search_path(python, script)
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=folder,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._on_gpu = not job.get("device", "cpu").startswith("cpu")
        self._send(job | {"folder": str(folder), "threads": threads})

    def about(self, limit: float) -> dict[str, Any]:
        """Wait until the engine is ready.

        Args:
            limit: seconds to wait.

        Returns:
            What the worker tells of the engine, such as its version.

        Raises:
            WorkerFailed: if it could not start, or not in time.
        """
        answer = self._receive(limit)
        if "error" in answer:
            self.close()
            raise WorkerFailed(answer["error"])
        return answer["about"]

    def run(self, case: dict[str, Any], limit: float) -> dict[str, Any]:
        """Measure one case.

        Args:
            limit: seconds that the answer may take.

        Returns:
            The worker's answer: `seconds`, or `error` with the engine's own message; and `peak_bytes`, the most memory of the
            GPU that the worker says it has held during this case, or on a CPU the most resident memory of its processes.

        Raises:
            WorkerFailed: if the process ended, or did not answer in time.
        """
        reset_peaks(self._process.pid)
        self._send(case)
        answer = self._receive(limit)
        if self._on_gpu:
            return answer | {"peak_bytes": answer.pop("gpu_peak_bytes", None)}
        peak = peak_bytes(self._process.pid)
        return answer | {"peak_bytes": answer.get("max_rss_bytes") if peak is None else peak}

    def close(self) -> None:
        """End the process and all processes that it has started."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        children = family(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for process in children:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # that the process has ended shows when its answer is waited for
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _receive(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self._kill()
            raise WorkerTimedOut(f"no answer within {limit:g} s") from None
        if not line:
            message = self._last_words()
            self.close()
            raise WorkerFailed(message)
        return json.loads(line)

    def _kill(self) -> None:
        for process in family(self._process.pid):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        cause = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{cause}{', perhaps for lack of memory' if status == -9 else ''}{f': {lines[-1][:200]}' if lines else ''}"


def _search_path(python: str, script: Path) -> str:
    """PYTHONPATH of a worker: this package for ours, this process's own for our interpreter, nothing for another one."""
    ours = [str(Path(yoco_u.__file__).parents[1])] if script.stem == "our_worker" else []
    inherited = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    return os.pathsep.join([*ours, *filter(None, [inherited])])


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; empty if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def reset_peaks(pid: int) -> None:
    """Set the peak memory of a process and its descendants back to what they hold now (Linux only)."""
    for process in family(pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int | None:
    """Peak resident memory of a process and its descendants, summed; None where the system does not tell it (not Linux)."""
    total = 0
    for process in family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return total or None
