"""What is measured: settings of a benchmark and the cases that follow from them."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from yoco_u.config import Config


class BenchSettings(Config):
    """Everything that a benchmark is asked for.

    Attributes:
        size: of the presets, see `yoco_u.architecture.SIZES`.
        architectures: presets to measure with our engine; none where `model` is given.
        model: folder of a checkpoint or run to measure instead.
        num_loops: loop count of the looped architectures, instead of their own.
        contexts: prompt lengths of prefill, and contexts behind which is decoded.
        batches: sequences that are decoded together.
        dtype: of weights, activations and caches, for all engines.
        weights: int8 quantizes the weights of ours, and of peers that can (llama.cpp).
        compile_peers: let peers compile where it costs a minute for every case (transformers' decode).
        steps: decode steps that are timed.
        rounds: how often cheap cases are repeated, in turn over all engines.
        time_limit: seconds that one case may take.
    """

    size: str = "100m"
    architectures: tuple[str, ...] = ("yoco_u", "yoco", "transformer", "rins")
    model: str | None = None
    num_loops: PositiveInt | None = None
    contexts: tuple[PositiveInt, ...] = Field(default=(4096, 32768, 131072), min_length=1)
    batches: tuple[PositiveInt, ...] = Field(default=(1, 16), min_length=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: Literal["bfloat16", "int8"] = "bfloat16"
    compile_peers: bool = True
    steps: PositiveInt = 32
    rounds: PositiveInt = 3
    time_limit: PositiveFloat = 600.0

    @property
    def bytes_per_element(self) -> int:
        return 4 if self.dtype == "float32" else 2


QUICK: dict[str, Any] = {
    "architectures": ("yoco_u", "transformer"),
    "contexts": (1024, 8192),
    "rounds": 1,
    "compile_peers": False,
    "time_limit": 60.0,
}
"""What `--quick` changes."""


@dataclass(frozen=True)
class Prefill:
    """A prompt of `tokens`, batch 1, behind `depth` tokens whose state is made up."""

    tokens: int
    depth: int = 0

    batch = 1
    kind = "prefill"

    @property
    def context(self) -> int:
        return self.depth + self.tokens


@dataclass(frozen=True)
class Decode:
    """`steps` decode steps of `batch` sequences, each behind `context` made-up tokens."""

    context: int
    batch: int
    steps: int

    kind = "decode"


Case = Prefill | Decode


def cases_of(settings: BenchSettings) -> list[Case]:
    """Prefills, then decodes, each from the cheapest on."""
    prefills = [Prefill(tokens) for tokens in sorted(set(settings.contexts))]
    decodes = [Decode(c, b, settings.steps) for b in sorted(set(settings.batches)) for c in sorted(set(settings.contexts))]
    return [*prefills, *decodes]


def as_job(case: Case) -> dict[str, Any]:
    """A case as workers read it."""
    return {"kind": case.kind, **asdict(case)}
