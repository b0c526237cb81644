"""Programs that see torch, transformers, safetensors and what these depend on, and no other package: not this one either."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOTS = ("torch", "transformers", "safetensors")
LEFT_OUT = ("pydantic", "pydantic-core")  # which some versions of typer bring, and others do not
_START = "import sys; sys.path[:] = [one for one in sys.path if 'site-packages' not in one] + [sys.argv.pop(1)]; "


def closure(names: tuple[str, ...] = ROOTS) -> set[str]:
    """These distributions, and all that they require on this system and that is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            required = [Requirement(one) for one in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        if name not in found and name not in LEFT_OUT:
            found.add(name)
            waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def make_environment(folder: Path) -> Path:
    """A folder to import from with links to nothing but these distributions."""
    folder.mkdir()
    for name in closure():
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return folder


def run(environment: Path, program: str, *arguments: str, **variables: str) -> str:
    """What a program prints that imports from this folder alone. Its error output is raised if it fails."""
    command = [sys.executable, "-I", "-S", "-c", _START + program, str(environment), *arguments]
    done = subprocess.run(command, env={"PATH": "", "OMP_NUM_THREADS": "1"} | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
