"""The C++ kernels for CPUs, registered as `torch.ops.yoco_u`.

They are compiled on first use, which takes a minute or two, and kept in torch's cache of extensions, under a name of their own
for each CPU, compiler, torch and state of the sources, so that checkouts and machines that share the cache do not rebuild each
other's. Call them through `yoco_u.inference.kernels`, which falls back to plain torch. Start reading at `vectors.h` and
`products.h`, on which the `.cpp` files build; each of these begins with what it computes.
"""

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from yoco_u.device import cxx_compiler

_FOLDER = Path(__file__).parent
_COMPLETE = "complete"  # an empty file beside a library that has been built to the end
_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fopenmp", "-Wno-psabi"]


@cache
def compiled() -> bool:
    """Build and load the C++ kernels. Returns whether they can be used; if not, a line on stderr says why."""
    from torch.utils import cpp_extension

    if os.environ.get("YOCO_U_KERNELS", "on") == "off":
        return False
    compiler = cxx_compiler()
    if compiler is None:
        print("no C++ compiler here: decoding is slower than it could be", file=sys.stderr)
        return False
    try:
        name = _name(compiler)
        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        # torch's own lock is a file. If a process is killed while it holds it, the file stays and all others wait for ever.
        with FileLock(folder.with_suffix(".lock")):
            (folder / "lock").unlink(missing_ok=True)
            if (folder / _COMPLETE).exists():  # `load` would build again for another environment's paths to the same torch
                torch.ops.load_library(folder / f"{name}.so")
            else:
                print("Building the C++ kernels for this CPU, once: a minute or two.", file=sys.stderr, flush=True)
                sources = [str(path) for path in sorted(_FOLDER.glob("*.cpp"))]
                cpp_extension.load(name, sources, extra_cflags=_FLAGS, is_python_module=False)
                (folder / _COMPLETE).touch()
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"the C++ kernels could not be built ({reason}): decoding is slower than it could be", file=sys.stderr)
        return False
    return True


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
