"""The kernels as they are compiled for CPUs with fewer instructions than this one."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from yoco_u.device import cxx_compiler
from yoco_u.inference.kernels.cpu import _FLAGS, compiled

NARROWER = {"__AVX512BF16__": "-U__AVX512BF16__", "__AVX512F__": "-mno-avx512f", "__AVX__": "-mno-avx"}
"""Flags that take instructions away, by what this CPU must have for that."""

CODE = """
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from torch.utils import cpp_extension

from yoco_u.inference import kernels
from yoco_u.inference.kernels import cpu

here, flag = sys.argv[1:]
folder = Path(cpu.__file__).parent
sources = [f"{here}/portable_operators.cpp", f"{folder}/attention.cpp"]
name, flags = "yoco_u_portable" + flag.replace("-", "_"), [*cpu._FLAGS, "-O1", flag]  # -O1 compiles in half the time
built = Path(cpp_extension._get_build_directory(name, verbose=False))
with FileLock(built.with_suffix(".lock")):
    (built / "lock").unlink(missing_ok=True)  # of a process that was killed, for which torch would wait
    cpp_extension.load(name, sources, extra_cflags=flags, extra_include_paths=[str(folder)], is_python_module=False)
kernels.compiled = cpu.compiled = lambda: True
files = [f"{here}/{file}.py" for file in ("test_prepacked_linear", "test_chunk_attention", "test_kernels")]
options = ["-k", "not turned_off and not without"]
sys.exit(pytest.main([*files, *options, "--quiet", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:xdist"]))
"""


@cache
def macros() -> str:
    command = [str(cxx_compiler()), *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not compiled(), reason="needs a C++ compiler")
@pytest.mark.parametrize("instructions", NARROWER)
def test_kernels_with_fewer_instructions(instructions: str) -> None:
    """In a process of its own, since an operator has one implementation a process."""
    if instructions not in macros().split():
        pytest.skip(f"this CPU has no {instructions}")
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", CODE, here, NARROWER[instructions]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
