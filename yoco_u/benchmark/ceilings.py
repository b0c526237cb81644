"""What the machine can do at most: the measure of every engine."""

import time
from typing import NamedTuple

import psutil
import torch

from yoco_u.planning.hardware import DType, Hardware
from yoco_u.training.machine import environment, find_device, gemm_rate

_TENSOR_BYTES = 512 * 2**20


class Ceilings(NamedTuple):
    """Attributes:
    gemm: FLOP/s of square matrix products.
    memory: bytes per second read from main memory by all threads.
    busy: how many CPUs others keep busy meanwhile.
    """

    gemm: float
    memory: float
    busy: float = 0.0


def measure_ceilings(dtype: str) -> Ceilings:
    """All of it now; a benchmark takes the median over all turns, as it does for engines."""
    busy = psutil.cpu_percent(0.5) / 100 * (psutil.cpu_count() or 1)
    return Ceilings(gemm_rate(torch.device("cpu"), getattr(torch, dtype), seconds=0.5), memory_read_rate(), busy)


def this_machine(dtype: DType) -> Hardware:
    """The GPU of this machine if it has one, else the machine itself, measured now."""
    device = find_device("auto")
    gpu = device.type == "cuda"
    return Hardware(
        name=f"this machine ({environment(device)['device_name']})",
        memory=torch.cuda.get_device_properties(device).total_memory if gpu else psutil.virtual_memory().total,
        gemm=gemm_rate(device, getattr(torch, dtype), seconds=0.5),
        bandwidth=memory_read_rate(device=device),
    )


def memory_read_rate(bytes_: int = _TENSOR_BYTES, repeats: int = 5, device: torch.device | None = None) -> float:
    """Bytes per second: the best of summing and of taking the maximum over a tensor too large for any cache."""
    values = torch.ones(bytes_ // 4, device=device)
    best = float("inf")
    for reduce in (torch.sum, torch.amax):
        for _ in range(repeats + 1):  # the first one warms up
            begin = time.perf_counter()
            reduce(values).item()  # which waits for a GPU
            best = min(best, time.perf_counter() - begin)
    return values.nbytes / best
