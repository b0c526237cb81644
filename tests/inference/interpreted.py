"""Runs tests on Triton kernels in the interpreter, in a process of their own, as `TRITON_INTERPRET=1` holds for a process."""

import os
import subprocess
import sys
from pathlib import Path


def pass_in_the_interpreter(*files: str) -> None:
    """Assert that the tests of files beside this one pass there."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "YOCO_U_KERNELS": "off"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(Path(__file__).with_name(file)) for file in files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
