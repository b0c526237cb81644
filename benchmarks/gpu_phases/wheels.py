"""Packages that a machine without a package index lacks, from a folder of wheels.

They include what yoco_u imports, so nothing of it can be imported here.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


class CannotInstall(Exception):  # noqa: N818
    """The wheels cannot be installed; the message says why, in one line."""


@contextmanager
def use_wheels(folder: Path) -> Iterator[None]:
    """Within the context, this process and those that it starts find the packages of the wheels before all others.

    Raises:
        CannotInstall: if pip cannot install them, for instance because they are for another version of Python.
    """
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        yield
        return
    with TemporaryDirectory(prefix="yoco-u-wheels-") as site:
        offline = ["--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *offline, "--target", site, *wheels]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise CannotInstall(f"the wheels in {folder} do not fit ({said[-1]}); remove them where nothing is missing")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, before]))
        sys.path.insert(0, site)
        try:
            yield
        finally:
            sys.path.remove(site)
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
