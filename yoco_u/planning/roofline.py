"""The most that hardware allows: rates by roofline, and what fits into memory.

A roofline (Williams, Waterman and Patterson 2009) lets a piece of work take the longer of two times: that of its FLOPs at
the machine's best matrix products, and that of its bytes at the memory's best rate. Nothing runs faster; what really runs is
as much slower as its kernels are imperfect.
"""

from bisect import bisect_right
from typing import Literal, NamedTuple

from yoco_u.architecture import Architecture
from yoco_u.budget import decode_bytes, decode_flops, kv_bytes, prefill_bytes, prefill_flops, training_flops
from yoco_u.planning.hardware import Hardware


class Rate(NamedTuple):
    """Attributes:
    tokens_per_second: at most.
    bound: which of the two times it is.
    """

    tokens_per_second: float
    bound: Literal["compute", "memory"]


def prefill_rate(a: Architecture, hardware: Hardware, context: int, weight: float, element: float) -> Rate:
    """Prompt tokens per second of one prompt of `context` tokens, up to its first new token.

    Args:
        weight, element: bytes of a weight, and of a number in the caches.
    """
    return _rate(hardware, context, prefill_flops(a, context), prefill_bytes(a, context, weight, element))


def decode_rate(a: Architecture, hardware: Hardware, context: int, batch: int, weight: float, element: float) -> Rate:
    """New tokens per second of `batch` sequences together, each behind a context."""
    return _rate(hardware, batch, batch * decode_flops(a, context), decode_bytes(a, context, batch, weight, element))


def training_rate(a: Architecture, hardware: Hardware, sequence_length: int) -> float:
    """Tokens per second of training at the rate of matrix products; batches are large enough for memory not to matter."""
    return hardware.gemm / training_flops(a, sequence_length)


def largest_batch(a: Architecture, context: int, room: float, element: float) -> int:
    """How many sequences of `context` tokens the caches hold in `room` bytes."""
    return max(0, int(room // kv_bytes(a, context, element)))


def largest_context(a: Architecture, batch: int, room: float, element: float) -> int | None:
    """How many tokens each of `batch` sequences may have in `room` bytes; None where nothing grows with the context."""
    if not any(stage.attention in ("full", "cross") for stage in a.stages):
        return None if batch * kv_bytes(a, a.window or 1, element) <= room else 0
    return bisect_right(range(1, 2**50), room, key=lambda tokens: batch * kv_bytes(a, tokens, element))


def _rate(hardware: Hardware, tokens: int, flops: float, bytes_: float) -> Rate:
    compute, memory = flops / hardware.gemm, bytes_ / hardware.bandwidth
    return Rate(tokens / max(compute, memory), "compute" if compute >= memory else "memory")
