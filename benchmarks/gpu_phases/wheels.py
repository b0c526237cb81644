"""Packages that a machine without a package index lacks, from a folder of wheels."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def use_wheels(folder: Path) -> Iterator[None]:
    """Within the context, this process and those that it starts find the packages of the wheels before all others."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        yield
        return
    with TemporaryDirectory(prefix="yoco-u-wheels-") as site:
        offline = ["--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--quiet"]
        subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", site, *wheels], check=True)
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
