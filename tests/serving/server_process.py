"""`yoco-u serve` in a process of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import httpx2

SETTINGS = ("--dtype", "float32", "--cache-tokens", "4096", "--max-num-seqs", "4", "--max-waiting", "4", "--port", "0")


class Process:
    """A server process and where it listens."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        command = [sys.executable, "-m", "yoco_u.cli", "serve", str(folder), "--name", "tiny", *SETTINGS, *arguments]
        with log.open("w") as file:
            self.process = forked.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "YOCO_U_KERNELS": "off", **(environment or {})},
            )
        self.url = self._find_url()

    def _find_url(self) -> str:
        for _ in range(6000):
            if found := re.search(r"at (https?://\S+:\d+)", self.log.read_text()):
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def metric(self, name: str) -> float:
        text = httpx2.get(f"{self.url}/metrics", timeout=60).text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    def wait_for(self, name: str, value: float) -> None:
        for _ in range(30_000):
            if self.metric(name) == value:
                return
            time.sleep(0.01)
        raise AssertionError(f"{name} is {self.metric(name)}, not {value}")


@contextmanager
def serving(*arguments: Any, **settings: Any) -> Iterator[Process]:
    process = Process(*arguments, **settings)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
