"""The machine's ceilings: the rates of which every engine reaches a share."""

from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from yoco_u.device import gemm_rate, memory_read_rate

UNSTEADY = 1.2
"""The highest rate of a machine as a multiple of its lowest, above which shares of it mislead."""


class Ceilings(NamedTuple):
    """What the machine can do at most.

    Attributes:
        gemm: FLOP/s of square matrix products.
        memory: bytes per second that the GPU, or all threads of the CPU together, read from memory.
        busy: how many CPUs other processes kept busy just before; above 0 the other figures are too low. 0 for a GPU, whose
            work is not theirs.
    """

    gemm: float
    memory: float
    busy: float = 0.0


def measure_ceilings(dtype: str, device: torch.device) -> Ceilings:
    """Measure the ceilings now. A benchmark does so before each turn of an engine and takes the highest."""
    busy = psutil.cpu_percent(0.5) / 100 * (psutil.cpu_count() or 1) if device.type == "cpu" else 0.0
    found = Ceilings(gemm_rate(device, getattr(torch, dtype), seconds=0.5), memory_read_rate(device=device), busy)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engines have the whole memory
    return found


def unsteady(ceilings: Sequence[Ceilings]) -> list[str]:
    """A line for each rate that was over 1.2 times as high at one turn of an engine as at another."""
    rates = {
        "multiplied": ("GFLOP/s", [one.gemm / 1e9 for one in ceilings]),
        "read its memory": ("GB/s", [one.memory / 1e9 for one in ceilings]),
    }
    return [
        f"the machine {does} at {min(found):,.1f} to {max(found):,.1f} {unit} from turn to turn; shares are of the highest rate"
        for does, (unit, found) in rates.items()
        if max(found) > UNSTEADY * min(found)
    ]
