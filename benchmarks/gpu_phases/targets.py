"""What an H100 should reach, and the arithmetic behind it: YOCO-U, 1.3B, bfloat16, batch 32, blocks of 256, 128 new tokens.

A ceiling is what the card could do if nothing but matrix products, or nothing but reading, took time.
"""

from typing import NamedTuple

from yoco_u import paper
from yoco_u.architecture import preset
from yoco_u.budget import decode_bytes, kv_bytes, prefill_flops

GEMM = 790e12
"""FLOP/s of bfloat16 matrix products of 8192 x 8192, as measured on an H100."""

MEMORY = 3.0e12
"""Bytes per second of a copy on an H100, read and written bytes together."""

BATCH = 32
PREFILL = 140_000
"""Tokens per second of prefill, the same at every context within 5%."""

DECODE = {8192: 5600, 16384: 4100, 65536: 1580, 262144: 450}
"""Tokens per second of decode, by context: 65 to 85% of the ceiling, more the longer the context."""

TRAINING_OF_GEMM = 0.5
"""Share of the measured rate of matrix products that training the 1.3B YOCO-U at length 8192 should reach."""

TRAINING_OVER_LLAMA = 1.3
"""How many times the model FLOP/s of transformers' Llama that training should reach."""


class Target(NamedTuple):
    """One context of a table, in tokens per second.

    Attributes:
        ceiling: the most that the card could do.
        goal: what we want to reach.
        paper: the paper's figure.
    """

    context: int
    ceiling: float
    goal: float
    paper: float


def prefill_targets() -> list[Target]:
    """A token costs prefill_flops / context FLOP, 3.34 GFLOP at each of these contexts."""
    a = preset("yoco_u", "1.3b")
    figures = paper.PREFILL_TOKENS_PER_SECOND
    return [Target(c, GEMM * c / prefill_flops(a, c), PREFILL, figures[c]["yoco_u"]) for c in DECODE]


def decode_targets() -> list[Target]:
    """A step reads decode_bytes: 4.71 GB of weights, looped ones three times, 1.0 GB of windows, the global KV ten times."""
    a = preset("yoco_u", "1.3b")
    figures = paper.DECODE_TOKENS_PER_SECOND
    return [Target(c, MEMORY * BATCH / decode_bytes(a, c, BATCH), DECODE[c], figures[c]["yoco_u"]) for c in DECODE]


def kv_mebibytes(name: str, context: int) -> float:
    """Keys and values of one sequence, by arithmetic; the engine's caches are held to it by the tests."""
    return kv_bytes(preset(name, "1.3b"), context) / 2**20
