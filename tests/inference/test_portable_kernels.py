"""The kernels of matrix products as they are compiled for a CPU without bfloat16 instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yoco_u.device import cxx_compiler
from yoco_u.inference.kernels.cpu import _FLAGS, compiled

CODE = """
import os, sys
os.environ["YOCO_U_KERNELS"] = "off"
sys.path[:0] = sys.argv[1:]
from torch.utils import cpp_extension
import test_chunk_attention, test_prepacked_linear
from yoco_u.inference.kernels import cpu

kernels = cpu.__path__[0]
sources = [f"{kernels}/prepacked_linear.cpp", f"{kernels}/chunk_attention.cpp", f"{sys.argv[1]}/portable_operators.cpp"]
flags = [*cpu._FLAGS, "-U__AVX512BF16__"]
cpp_extension.load("yoco_u_portable", sources, extra_cflags=flags, extra_include_paths=[kernels], is_python_module=False)
for shape in [(1, 64, 64), (7, 33, 65), (70, 300, 130)]:
    test_prepacked_linear.check_kernel(*shape)
for shape, window in [((1, 1, 1, 1, 2), 1), ((70, 150, 2, 3, 40), 60), ((9, 200, 1, 4, 64), 200)]:
    test_chunk_attention.check(*test_chunk_attention.inputs(*shape), window)
print("portable")
"""


def has_bfloat16_instructions() -> bool:
    command = [str(cxx_compiler()), *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    return "__AVX512BF16__" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not compiled(), reason="needs a C++ compiler")
@pytest.mark.skipif(compiled() and not has_bfloat16_instructions(), reason="these kernels are the ones that all tests run here")
def test_kernels_without_bfloat16_instructions() -> None:
    """In a process of its own, since an operator has one implementation a process."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", CODE, str(here), str(here.parent)], capture_output=True, text=True)
    assert done.stdout == "portable\n", done.stderr
