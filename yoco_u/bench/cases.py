"""What is measured: the settings of a benchmark, and the cases that follow from them."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from yoco_u.config import Config, Count, EachOnce, Loops, Seconds, at_most


class BenchSettings(Config):
    """Everything that can be set in a benchmark.

    Attributes:
        size: size of the presets, see `yoco_u.architecture.SIZES`.
        architectures: the presets that our engine runs, unless `model` is given.
        model: a checkpoint or run to measure instead of the presets.
        num_loops: T of the looped architectures; their own by default.
        contexts: lengths in tokens: of the prompts of prefill cases, and of the contexts of decode cases.
        batches: how many sequences are decoded together, in each case.
        device: where all engines run, as torch names it.
        dtype: data type of weights, activations and caches, for all engines.
        weights: int8 quantizes the weights of our engine, and of the peers that can (llama.cpp).
        block_size: tokens in a block of our engine's pages.
        compile_peers: compile peers even where that costs a minute for every case (transformers' decode).
        steps: how many steps of a decode case are timed.
        rounds: how often a case is measured, unless it takes long.
        time_limit: seconds that one case may take.
    """

    size: str = "100m"
    architectures: tuple[str, ...] = ("yoco_u", "yoco", "transformer", "rins")
    model: str | None = None
    num_loops: Loops | None = None
    contexts: Annotated[tuple[Count, ...], EachOnce] = Field(default=(4096, 32768, 131072), min_length=1)
    batches: Annotated[tuple[Count, ...], EachOnce] = Field(default=(1, 16), min_length=1)
    device: str = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: Literal["bfloat16", "int8"] = "bfloat16"
    block_size: Count = 64
    compile_peers: bool = True
    steps: Count = 32
    rounds: Annotated[Count, at_most(1000, "a median changes no more")] = 3
    time_limit: Seconds = 600.0

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
"""The settings that `--quick` changes."""


@dataclass(frozen=True)
class Prefill:
    """The prefill of one prompt of `tokens` tokens, behind `depth` tokens whose keys and values are random."""

    tokens: int
    depth: int = 0

    batch = 1
    kind = "prefill"

    @property
    def context(self) -> int:
        """Tokens of the whole sequence in the end."""
        return self.depth + self.tokens


@dataclass(frozen=True)
class Decode:
    """`steps` decode steps of `batch` sequences together, each behind `context` tokens whose keys and values are random."""

    context: int
    batch: int
    steps: int

    kind = "decode"


Case = Prefill | Decode


def cases_of(settings: BenchSettings) -> list[Case]:
    """All cases of a benchmark: the prefills, then the decodes, each kind from the cheapest case on."""
    prefills = [Prefill(tokens) for tokens in sorted(set(settings.contexts))]
    decodes = [Decode(c, b, settings.steps) for b in sorted(set(settings.batches)) for c in sorted(set(settings.contexts))]
    return [*prefills, *decodes]


def case_as_json(case: Case) -> dict[str, Any]:
    """A case as a worker reads it, see `worker_protocol`."""
    return {"kind": case.kind, **asdict(case)}
