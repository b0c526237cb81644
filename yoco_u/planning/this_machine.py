"""The machine that the command runs on, measured for a plan. Unlike the rest of planning this needs torch."""

import torch

from yoco_u.device import environment, find_device, gemm_rate, memory_bytes, memory_read_rate
from yoco_u.planning.hardware import DType, Hardware


def this_machine(dtype: DType) -> Hardware:
    """Measure the GPU of this machine if there is one, else its CPU and main memory."""
    device = find_device("auto")
    return Hardware(
        name=f"this machine ({environment(device)['device_name']})",
        memory=memory_bytes(device),
        gemm=gemm_rate(device, getattr(torch, dtype), seconds=0.5),
        bandwidth=memory_read_rate(device=device),
    )
