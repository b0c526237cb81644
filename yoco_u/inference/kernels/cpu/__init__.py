"""The C++ kernels for CPUs, registered as `torch.ops.yoco_u`.

They are compiled on first use, which takes a minute or two, and kept in torch's cache of extensions. Call them through
`yoco_u.inference.kernels`, which falls back to plain torch. Start reading at `vectors.h` and `products.h`, on which the `.cpp`
files build; each of these begins with what it computes.
"""

import os
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock

from yoco_u.device import cxx_compiler

_NAME = "yoco_u_kernels"
_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fopenmp", "-Wno-psabi"]


@cache
def compiled() -> bool:
    """Build and load the C++ kernels. Returns whether they can be used; if not, a line on stderr says why."""
    from torch.utils import cpp_extension

    if os.environ.get("YOCO_U_KERNELS", "on") == "off":
        return False
    if cxx_compiler() is None:
        print("no C++ compiler here: decoding is slower than it could be", file=sys.stderr)
        return False
    sources = [str(path) for path in sorted(Path(__file__).parent.glob("*.cpp"))]
    folder = Path(cpp_extension._get_build_directory(_NAME, verbose=False))
    try:
        # torch's own lock is a file. If a process is killed while it holds it, the file stays and all others wait for ever.
        with FileLock(folder.with_suffix(".lock")):
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(_NAME, sources, extra_cflags=_FLAGS, is_python_module=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"the C++ kernels could not be built ({reason}): decoding is slower than it could be", file=sys.stderr)
        return False
    return True
