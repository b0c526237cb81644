"""Programs in processes forked from one that has imported the package, which takes longer than most tests.

Python itself does not start and shut down there as it does for a user: what depends on that needs `subprocess`.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

FORKS = multiprocessing.get_context("forkserver")  # its server has no threads, which do not survive a fork
FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.utils.tensorboard",
        "yoco_u.training",
        "yoco_u.inference",
        "yoco_u.evaluation",
        "yoco_u.serving.server",
    ]
)


class Popen:
    """What of `subprocess.Popen` the package and the tests use, for `python -m MODULE ...` and `python SCRIPT ...`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] = os.environ,
        text: bool = False,
        encoding: str | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert command[0] == sys.executable
        ends: list[int] = []
        self.stdin = self.stdout = None
        mode, options = ("", {"encoding": encoding}) if text else ("b", {})
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.PIPE:
                reading, writing = os.pipe()
                if number == 0:
                    ends.append(reading)
                    self.stdin = open(writing, "w" + mode, **options)  # noqa: SIM115
                else:
                    ends.append(writing)
                    self.stdout = open(reading, "r" + mode, **options)  # noqa: SIM115
            elif stream == subprocess.DEVNULL:
                ends.append(os.open(os.devnull, os.O_RDWR))
            elif stream == subprocess.STDOUT:
                ends.append(os.dup(ends[1]))
            else:
                ends.append(os.dup(number if stream is None else stream if isinstance(stream, int) else stream.fileno()))
        streams = [Connection(end) for end in ends]  # which can be sent to another process
        arguments = (list(command[1:]), streams, Path(cwd or ".").resolve(), dict(env), start_new_session)
        self._process = FORKS.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        for one in streams:
            one.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([], timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


SUBPROCESS = SimpleNamespace(**vars(subprocess) | {"Popen": Popen})
"""What a test puts in the place of the name `subprocess` in a module of the package."""


def _run(command: list[str], streams: list[Connection], cwd: Path, environment: dict[str, str], new_session: bool) -> None:
    gc.freeze()  # what was imported before the fork, so that collecting garbage does not look through it
    if new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    os.chdir(cwd)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
