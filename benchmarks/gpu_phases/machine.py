"""The card, the driver and the versions; and the ceilings: rates of matrix products, of copying and of reading memory."""

import subprocess
from importlib.util import find_spec
from typing import Any

import torch
from common import seconds
from packaging.version import Version

from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.device import environment, find_device, memory_bytes, memory_read_rate, synchronize
from yoco_u.errors import UserError

OLDEST_TORCH = "2.11"
_COPIED_BYTES = {"cpu": 2**26, "cuda": 2**32}


def run(record: Record, scale: Scale) -> None:
    device = find_device(scale.device)
    record.measure("environment", lambda: described(device))
    record.measure("matrix products", lambda: matrix_products(device, scale.gemm))
    record.measure("memory", lambda: memory(device))


def check_device(name: str, earlier: Record) -> None:
    """Check that the device can be measured, before any phase.

    Args:
        earlier: what this phase found in an earlier call.

    Raises:
        UserError: if the device is not there or lacks what the GPU's engine needs, or if earlier figures are of another card.
    """
    if Version(torch.__version__) < Version(OLDEST_TORCH):
        raise UserError(f"torch is {torch.__version__}; expected {OLDEST_TORCH} or later, which has variable-length attention")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; run this where there is one, or give --dry, which runs every phase on the CPU")
    device = find_device(name)
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise UserError("Triton is not installed, but the GPU's kernels are written in it; pip install 'yoco-u[gpu]'")
        if torch.cuda.get_device_capability(device) < (8, 0):
            card = torch.cuda.get_device_name(device)
            raise UserError(f"{card} has no bfloat16; the benchmark needs a GPU of compute capability 8.0 or later")
    known, here = earlier.figures.get("environment", {}).get("device_name"), environment(device)["device_name"]
    if known not in (None, here):
        raise UserError(f"{earlier.path.parent} holds figures of {known}, but this is {here}; give another --out")


def described(device: torch.device) -> Figure:
    found: dict[str, Any] = environment(device) | {"gpu_memory_bytes": memory_bytes(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "nvidia_smi": _nvidia_smi(),
        }
        import triton

        found["triton"] = triton.__version__
    return found


def matrix_products(device: torch.device, side: int, repeats: int = 10) -> Figure:
    """FLOP/s of the product of two bfloat16 matrices: the mean of ten, one after the other, and the fastest."""
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    times = _times(device, lambda: a @ b, repeats)
    flops = 2 * side**3
    return {"side": side, "mean_flops_per_second": flops * repeats / sum(times), "best_flops_per_second": flops / min(times)}


def memory(device: torch.device) -> Figure:
    """Bytes per second: of a copy within the device's memory, read and written bytes both counted, and of reading alone."""
    size = _COPIED_BYTES[device.type]
    copied = _copy_rate(device, size)  # whose tensors are gone before the next one comes
    return {
        "copied_bytes": size,
        "copy_bytes_per_second": copied,
        "read_bytes_per_second": memory_read_rate(device=device),
    }


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(_times(device, lambda: target.copy_(source), 10))


def _times(device: torch.device, call: Any, repeats: int) -> list[float]:
    """Seconds of each call; on a GPU by its own clock, which leaves out the launches."""
    if device.type == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        synchronize(device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return seconds(call, repeats)


def _nvidia_smi() -> str | None:
    """Driver, clocks and power limit, as the driver tells them."""
    fields = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
