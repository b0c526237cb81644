"""What a card should reach, and the arithmetic behind it: YOCO-U, 1.3B, bfloat16, batch 32, blocks of 256, 128 new tokens.

A ceiling is what the card could do if nothing but matrix products, or nothing but reading, took time. Goals are an H100's, and
scaled for other cards as the ceilings are.
"""

from typing import NamedTuple

from gpu_phases.record import Figure
from yoco_u import paper
from yoco_u.architecture import preset
from yoco_u.budget import decode_bytes, kv_bytes, prefill_flops


class Rates(NamedTuple):
    """What a card does at most.

    Attributes:
        card: which one.
        gemm: FLOP/s of bfloat16 matrix products of 8192 x 8192, the mean of several.
        memory: bytes per second of a copy, read and written bytes together.
    """

    card: str
    gemm: float
    memory: float


H100 = Rates("an H100", 790e12, 3.0e12)

BATCH = 32
PREFILL = 140_000
"""Tokens per second of prefill on an H100, the same at every context within 5%."""

DECODE = {8192: 5600, 16384: 4100, 65536: 1580, 262144: 450}
"""Tokens per second of decode on an H100, by context: 65 to 85% of the ceiling, more the longer the context."""

TRAINING_OF_GEMM = 0.5
"""Share of the measured rate of matrix products that training the 1.3B YOCO-U at length 8192 should reach."""

TRAINING_OVER_LLAMA = 1.3
"""How many times the model FLOP/s of transformers' Llama that training should reach."""


class Target(NamedTuple):
    """One context of a table, in tokens per second.

    Attributes:
        ceiling: the most that the card could do.
        goal: what we want to reach on it.
        paper: the paper's figure, of an H100.
    """

    context: int
    ceiling: float
    goal: float
    paper: float


def measured_rates(machine: dict[str, Figure]) -> Rates:
    """The rates of the card that the phase `machine` has measured, or an H100's where it has not.

    Args:
        machine: the figures of that phase.
    """
    gemm = machine.get("matrix products", {}).get("mean_flops_per_second")
    memory = machine.get("memory", {}).get("copy_bytes_per_second")
    card = machine.get("environment", {}).get("device_name")
    return Rates(card, gemm, memory) if card and gemm and memory else H100


def prefill_targets(rates: Rates = H100) -> list[Target]:
    """A token costs prefill_flops / context FLOP, 3.34 GFLOP at each of these contexts."""
    a = preset("yoco_u", "1.3b")
    figures = paper.PREFILL_TOKENS_PER_SECOND
    goal = PREFILL * rates.gemm / H100.gemm
    return [Target(c, rates.gemm * c / prefill_flops(a, c), goal, figures[c]["yoco_u"]) for c in DECODE]


def decode_targets(rates: Rates = H100) -> list[Target]:
    """A step reads decode_bytes: 4.71 GB of weights, looped ones three times, 1.0 GB of windows, the global KV ten times."""
    a = preset("yoco_u", "1.3b")
    figures, faster = paper.DECODE_TOKENS_PER_SECOND, rates.memory / H100.memory
    return [
        Target(c, rates.memory * BATCH / decode_bytes(a, c, BATCH), goal * faster, figures[c]["yoco_u"])
        for c, goal in DECODE.items()
    ]


def kv_mebibytes(name: str, context: int) -> float:
    """Keys and values of one sequence, by arithmetic; the engine's caches are held to it by the tests."""
    return kv_bytes(preset(name, "1.3b"), context) / 2**20
