"""The C++ kernels for CPUs, registered as `torch.ops.yoco_u`.

They are compiled on first use, which takes a minute or two, and kept in torch's cache of extensions, under a name of their own
for each CPU, compiler, torch and state of the sources, so that checkouts and machines that share the cache do not rebuild each
other's. Call them through `yoco_u.inference.kernels`, which falls back to plain torch. Start reading at `vectors.h` and
`products.h`, on which the `.cpp` files build; each of these begins with what it computes.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from yoco_u.device import cxx_compiler, environment_variables
from yoco_u.errors import UserError

_FOLDER = Path(__file__).parent
_COMPLETE = "complete"  # an empty file beside a library that has been built to the end
_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fopenmp", "-Wno-psabi"]


@cache
def compiled() -> bool:
    """Build and load the C++ kernels. Returns whether they can be used; if not, a line on stderr says why.

    Raises:
        UserError: if the environment variable YOCO_U_KERNELS is neither `on` nor `off`.
    """
    wanted = os.environ.get("YOCO_U_KERNELS") or "on"
    if wanted not in ("on", "off"):
        raise UserError(f"YOCO_U_KERNELS is {wanted!r}; expected on or off")
    if wanted == "off":
        return False
    compiler = cxx_compiler()
    if compiler is None:
        asked = f" ({asked!r}, as CXX says)" if (asked := os.environ.get("CXX")) else ""
        print(f"no C++ compiler here{asked}: decoding is slower than it could be", file=sys.stderr)
        return False
    try:
        _load(compiler)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        print(f"the C++ kernels could not be built ({_reason(error)}): decoding is slower than it could be", file=sys.stderr)
        return False
    return True


def _load(compiler: str) -> None:
    """Load the kernels, and build them before if that has not been done or what was built is damaged."""
    from torch.utils import cpp_extension

    name = _name(compiler)
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    library = folder / f"{name}.so"
    if _loaded(library):  # without the lock, for which the folder would have to be writable
        return
    from ninja import BIN_DIR

    path = os.pathsep.join(filter(None, [os.environ.get("PATH"), BIN_DIR]))  # ninja, where no environment is activated
    with _lock(folder.with_suffix(".lock")), environment_variables(CXX=compiler, PATH=path):
        if _loaded(library):
            return
        print("Building the C++ kernels for this CPU, once: a minute or two.", file=sys.stderr, flush=True)
        if (folder / _COMPLETE).exists():  # what is damaged may look new enough to be kept
            shutil.rmtree(folder)
            folder.mkdir()
        # torch's own lock is a file. If a process is killed while it holds it, the file stays and all others wait for ever.
        (folder / "lock").unlink(missing_ok=True)
        sources = [str(path) for path in sorted(_FOLDER.glob("*.cpp"))]
        cpp_extension.load(name, sources, extra_cflags=_FLAGS, is_python_module=False)
        (folder / _COMPLETE).touch()


def _loaded(library: Path) -> bool:
    """Load a library if it has been built to the end, by whatever environment. Returns whether it could be loaded."""
    if not (library.parent / _COMPLETE).exists():
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Build alone. Who has to wait for that is told."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("Another process is building the C++ kernels: waiting for it.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _reason(error: Exception) -> str:
    """Why building failed, in a line: the first error of the compiler's or linker's output, else its last line."""
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    said = output.decode(errors="replace") if output else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if re.search(r"\berror: |\bld: ", line)), lines[-1])


def _name(compiler: str) -> str:
    """The extension's name, which depends on all that the compiled code depends on: two that differ never share a folder."""
    # `-march=native` means something else on each CPU. The macros that it defines say what, and name the compiler's version.
    command = [compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, check=True).stdout
    versions = f"{sys.implementation.cache_tag} {torch.__version__} {' '.join(_FLAGS)}"
    digest = hashlib.sha256(versions.encode() + b"\0" + macros)
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return f"yoco_u_kernels_{digest.hexdigest()[:16]}"
