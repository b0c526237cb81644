"""A worker in a process of its own: started, asked case by case, timed out, its peak memory read."""

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

import yoco_u


class WorkerFailed(Exception):  # noqa: N818
    """The worker is gone or cannot go on; the message says why, in one line."""


class WorkerTimedOut(WorkerFailed):
    """The worker did not answer in time and was killed."""


class Worker:
    """The process of one engine. After a `WorkerFailed` it is no more.

    Args:
        python: interpreter to run it.
        script: one of `yoco_u/bench/workers`.
        job: see `worker_protocol`; `folder` and `threads` are added here.
        threads: CPU threads that it may use.
    """

    def __init__(self, python: str, script: Path, job: dict[str, Any], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="yoco-u-bench-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        self._log = (folder / "stderr").open("w+", encoding="utf-8", errors="replace")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["PYTHONPATH"] = str(Path(yoco_u.__file__).parents[1]) if script.stem == "ours" else ""
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
        self._send(job | {"folder": str(folder), "threads": threads})

    def about(self, limit: float) -> dict[str, Any]:
        """Facts about the engine, once it is ready."""
        answer = self._receive(limit)
        if "error" in answer:
            self.close()
            raise WorkerFailed(answer["error"])
        return answer["about"]

    def run(self, case: dict[str, Any], limit: float) -> dict[str, Any]:
        """The worker's answer, with `peak_bytes` of its processes during this case; `error` in it is the engine's own."""
        reset_peaks(self._process.pid)
        self._send(case)
        answer = self._receive(limit)
        peak = peak_bytes(self._process.pid)
        return answer | {"peak_bytes": answer.get("max_rss_bytes") if peak is None else peak}

    def close(self) -> None:
        """End the process and all that it started."""
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
        with contextlib.suppress(OSError):  # a worker that is gone is noticed when its answer does not come
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


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def reset_peaks(pid: int) -> None:
    """Let the peaks of a process and its children count from here (Linux)."""
    for process in family(pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int | None:
    """Sum of the peaks of resident memory of a process and its children; None where the system does not tell (not Linux)."""
    total = 0
    for process in family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return total or None
