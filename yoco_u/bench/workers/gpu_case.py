"""What a case on a GPU needs besides: the memory that it took, and an end to a worker whose GPU does not answer any more."""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch


def measured(device: str, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a case.

    An error inside a kernel breaks a process's GPU for good, and every later case would fail with it. So the process ends then,
    and the next case gets a new one.

    Args:
        device: where it runs; on a CPU it is only run.

    Returns:
        The case's answer; on a GPU with `gpu_peak_bytes`.
    """
    if torch.device(device).type != "cuda":
        return case()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        answer = case()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise
    except Exception:
        try:
            torch.cuda.synchronize(device)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        raise
    return answer | {"gpu_peak_bytes": torch.cuda.max_memory_allocated(device)}
