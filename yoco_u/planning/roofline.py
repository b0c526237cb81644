"""The most that hardware allows: rates by the roofline model, and what fits into memory.

The roofline model (Williams, Waterman and Patterson 2009) bounds the time of a piece of work from below by the longer of two
times: its FLOPs at the machine's best rate of matrix products, and its bytes at the best rate of the memory. Real kernels
reach a part of that. Weights and global KVs count as bytes of the memory each time they are applied, which takes for granted
that they do not stay in the processor's caches from one loop or layer to the next. Those of small models may, and such a
model can be faster than these rates.
"""

from typing import Literal, NamedTuple

from yoco_u.architecture import Architecture
from yoco_u.budget import decode_bytes, decode_flops, kv_bytes, prefill_bytes, prefill_flops, training_flops
from yoco_u.planning.hardware import Hardware


class Rate(NamedTuple):
    """An upper bound of a rate.

    Attributes:
        tokens_per_second: the rate that the hardware allows at most.
        bound: which of the two times is the longer one and so limits the rate.
    """

    tokens_per_second: float
    bound: Literal["compute", "memory"]


def prefill_rate(a: Architecture, hardware: Hardware, context: int, weight: float, element: float) -> Rate:
    """Prompt tokens per second of the prefill of one prompt of `context` tokens, up to its first new token.

    Args:
        weight, element: bytes of one weight, and of one number in the caches.
    """
    return _rate(hardware, context, prefill_flops(a, context), prefill_bytes(a, context, weight, element))


def decode_rate(a: Architecture, hardware: Hardware, context: int, batch: int, weight: float, element: float) -> Rate:
    """New tokens per second of `batch` sequences that are decoded together, each behind `context` tokens.

    Args:
        weight, element: bytes of one weight, and of one number in the caches.
    """
    return _rate(hardware, batch, batch * decode_flops(a, context), decode_bytes(a, context, batch, weight, element))


def training_rate(a: Architecture, hardware: Hardware, sequence_length: int) -> float:
    """Tokens per second of training. Matrix products alone bound it: batches are taken to be too large for memory to matter."""
    return hardware.gemm / training_flops(a, sequence_length)


def largest_batch(a: Architecture, context: int, room: float, element: float) -> int:
    """How many sequences of `context` tokens have caches that fit into `room` bytes.

    Args:
        element: bytes of one number in the caches.
    """
    return max(0, int(room // kv_bytes(a, context, element)))


def largest_context(a: Architecture, batch: int, room: float, element: float) -> int | None:
    """How many tokens each of `batch` sequences can have so that their caches fit into `room` bytes.

    Args:
        element: bytes of one number in the caches.

    Returns:
        The number of tokens, 0 if not even one fits; None if no cache grows with the context, and they fit at any length.
    """
    if not any(stage.attention in ("full", "cross") for stage in a.stages):
        return None if batch * kv_bytes(a, a.window or 1, element) <= room else 0
    fitting, exceeding = 0, 1
    while batch * kv_bytes(a, exceeding, element) <= room:
        fitting, exceeding = exceeding, 2 * exceeding
    while exceeding - fitting > 1:
        middle = (fitting + exceeding) // 2
        if batch * kv_bytes(a, middle, element) <= room:
            fitting = middle
        else:
            exceeding = middle
    return fitting


def _rate(hardware: Hardware, tokens: int, flops: float, bytes_: float) -> Rate:
    compute, memory = flops / hardware.gemm, bytes_ / hardware.bandwidth
    return Rate(tokens / max(compute, memory), "compute" if compute >= memory else "memory")
