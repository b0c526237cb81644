"""The machine: which device and compiler it has, how fast it multiplies and reads, and how much memory a process took.

The rate of matrix products is the denominator of MFU; the benchmark's shares and `yoco-u plan --hardware this` use both rates.
"""

import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from yoco_u.errors import UserError, first_line
from yoco_u.version import __version__

_PACKAGES = ("transformers", "tokenizers", "numpy")
_TENSOR_BYTES = 512 * 2**20
_GPU_TENSOR_BYTES = 2**32  # read in a millisecond, beside which the microseconds of a launch do not count


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of a name.

    Args:
        name: `auto`, which is the GPU if there is one and else the CPU, or a device as torch names it.
        local_rank: number of the GPU that `cuda` without a number means.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if _has_gpu() else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        device = torch.empty(0, device=device).device  # cpu for cpu:5
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"device {name!r} cannot be used ({first_line(error)}); expected auto, cpu or a GPU of this machine"
        ) from None
    if device.type == "meta":
        raise UserError("device 'meta' computes nothing; expected auto, cpu or a GPU of this machine")
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware. Elsewhere it is emulated, which is much slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()


def fast_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """The dtype in which a device multiplies fastest: bfloat16 where its hardware does."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def check_bfloat16(device: torch.device) -> None:
    """Refuse a GPU that cannot multiply bfloat16 numbers.

    Raises:
        UserError: for compute capabilities below 8.0.
    """
    if device.type == "cuda" and not multiplies_bfloat16(device):
        name, found = torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise UserError(f"{name} has compute capability {found}, but bfloat16 needs 8.0; set dtype float32")


def _has_gpu() -> bool:
    """Whether torch can use a GPU. Where one is there that it cannot use, as when the driver is too old, a line says why."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    for warning in noted:
        print(f"the GPU is not used: {str(warning.message).splitlines()[0]}", file=sys.stderr)
    return found


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on `device` of values that the host holds (a list, an array or a CPU tensor); a GPU is not waited for."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def read_back(tensor: torch.Tensor) -> Any:
    """The values of a tensor as nested lists. On a GPU the host waits here for all work queued before."""
    return tensor.tolist()


def host_waits(device: torch.device) -> bool:
    """Whether looking at a value on a device makes the host wait: everywhere but on a CPU."""
    return device.type != "cpu"


@contextmanager
def environment_variables(**values: str) -> Iterator[None]:
    """Give variables of the environment other values for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cxx_compiler() -> str | None:
    """The path of the C++ compiler that torch.compile and our own kernels use; None where none is installed.

    It is the compiler that the environment variable CXX names, otherwise the first of c++, g++ and clang++ that is installed.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def what_compiling_lacks(device: torch.device) -> str | None:
    """What torch.compile lacks for a device, in words; None where it has all that it needs."""
    if device.type == "cuda":
        return what_triton_lacks()
    return None if cxx_compiler() else "there is no C++ compiler here (c++, g++, clang++, or what CXX names)"


@cache
def what_triton_lacks() -> str | None:
    """Why Triton cannot launch kernels on a GPU, in words; None where it can. It builds what launches them, if need be."""
    if find_spec("triton") is None:
        return "Triton is not installed; expected 3.6 or later: pip install 'yoco-u[gpu]'"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        return (
            f"Triton cannot launch kernels here ({first_line(error)}); it needs a C compiler (gcc, clang, or what CC names) "
            "and the headers of Python (python3-dev)"
        )
    return None


def gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products on a device: that of the fastest product.

    Where bfloat16 is emulated, float32 stands for it, in which the device can compute the same faster.

    Args:
        seconds: how long to repeat the product; it is timed three times at least.
    """
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        dtype = torch.float32
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # not torch's own one, whose state a resumed run has just restored
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    runs, start = 0, time.perf_counter()
    while runs < 4 or time.perf_counter() - start < seconds:
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        if runs > 0:  # the first product warms up
            best = min(best, time.perf_counter() - begin)
        runs += 1
    return 2 * n**3 / best


def memory_read_rate(bytes_: int | None = None, repeats: int = 5, device: torch.device | None = None) -> float:
    """Bytes per second that a device reads from its memory: the fastest sum or maximum over a tensor too large for any cache.

    Args:
        bytes_: size of the tensor; by default 512 MiB on a CPU and 4 GiB on a GPU.
        repeats: how often each of the two is timed.
        device: the CPU by default, which reads with all of torch's threads.
    """
    default = _GPU_TENSOR_BYTES if device is not None and device.type == "cuda" else _TENSOR_BYTES
    values = torch.ones((bytes_ or default) // 4, device=device)
    best = float("inf")
    for reduce in (torch.sum, torch.amax):
        for _ in range(repeats + 1):  # the first pass warms up
            begin = time.perf_counter()
            reduce(values).item()  # `item` waits for a GPU
            best = min(best, time.perf_counter() - begin)
    return values.nbytes / best


def environment(device: torch.device) -> dict[str, Any]:
    """Time, versions and hardware, as runs and benchmarks record them beside their results."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "yoco_u": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, which the package of a GPU build leaves out
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
    }


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has: the GPU's own, or the machine's main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def free_memory_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory_bytes(device: torch.device) -> int:
    """The most bytes that this process has held so far: memory of the GPU that torch allocated, or resident main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait for all work that was queued on a GPU; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
