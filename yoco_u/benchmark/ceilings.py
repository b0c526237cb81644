"""What the machine can do at most: the measure of every engine."""

import time
from typing import NamedTuple

import psutil
import torch

from yoco_u.training.machine import gemm_rate

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


def memory_read_rate(bytes_: int = _TENSOR_BYTES, repeats: int = 5) -> float:
    """Bytes per second: the best of summing and of taking the maximum over a tensor too large for any cache."""
    values = torch.ones(bytes_ // 4)
    best = float("inf")
    for reduce in (torch.sum, torch.amax):
        for _ in range(repeats + 1):  # the first one warms up
            begin = time.perf_counter()
            reduce(values)
            best = min(best, time.perf_counter() - begin)
    return values.nbytes / best
