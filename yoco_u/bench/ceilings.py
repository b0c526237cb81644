"""What the machine can do at most: the measure of every engine."""

from typing import NamedTuple

import psutil
import torch

from yoco_u.device import gemm_rate, memory_read_rate


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
