"""A plan: the figures of several architectures at several context lengths, and their ratios to a reference."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field, PositiveInt

from yoco_u.architecture import Architecture
from yoco_u.budget import (
    KVType,
    bytes_per_kv_element,
    decode_flops,
    kv_bytes,
    optimizer_bytes,
    parameters,
    prefill_flops,
    training_flops,
)
from yoco_u.config import Config, Count
from yoco_u.planning.hardware import DType, Hardware
from yoco_u.planning.roofline import decode_rate, largest_batch, largest_context, prefill_rate, training_rate


class PlanSettings(Config):
    """What is planned for.

    Attributes:
        contexts: lengths in tokens. Each counts as the length of a training row, as that of a prompt to prefill, and as that of
            the context behind which a token is decoded.
        batch: number of sequences that are decoded together.
        dtype: data type of weights and activations.
        kv_dtype: data type of the caches; `dtype` by default.
    """

    contexts: tuple[PositiveInt, ...] = Field(default=(8192, 65536, 262144), min_length=1)
    batch: Count = 32
    dtype: DType = "bfloat16"
    kv_dtype: KVType | None = None

    @property
    def bytes_per_weight(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class ContextFigures:
    """The figures of an architecture at one context length.

    FLOPs are model FLOPs, see `yoco_u.budget`. Rates are upper bounds, see `roofline`.

    Attributes:
        prefill_flops_per_token: FLOPs of a whole prefill, divided by the tokens of the prompt.
        kv_bytes_per_sequence, kv_bytes: bytes of the caches of one sequence, and of the batch.
        fits: whether the weights and the caches of the batch fit into memory together.
        largest_batch: how many sequences' caches fit beside the weights.
        prefill_tokens_per_second: prompt tokens per second when one prompt is computed alone.
        decode_tokens_per_second: new tokens per second, of all sequences of the batch together.
        prefill_bound, decode_bound: what limits the rate, `compute` or `memory`.
    """

    context: int
    training_flops_per_token: float
    prefill_flops_per_token: float
    decode_flops_per_token: float
    kv_bytes_per_sequence: int
    kv_bytes: int
    fits: bool
    largest_batch: int
    training_tokens_per_second: float
    prefill_tokens_per_second: float
    prefill_bound: str
    decode_tokens_per_second: float
    decode_bound: str


RATIOS = (
    "training_flops_per_token",
    "prefill_flops_per_token",
    "decode_flops_per_token",
    "kv_bytes_per_sequence",
    "training_tokens_per_second",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
)
"""The figures of `ContextFigures` that are also given as multiples of the reference's."""


@dataclass(frozen=True)
class Column:
    """One architecture: a column of the table.

    Attributes:
        active_parameters: parameters that one token meets; less than `parameters` for a mixture of experts.
        weight_bytes: bytes of the weights in the plan's dtype.
        training_state_bytes: bytes of float32 weights, gradients and AdamW's moments.
        largest_context: how many tokens each sequence of the batch can have in the memory that the weights leave; None if no
            cache grows with the context.
        figures: the figures by context length.
    """

    name: str
    architecture: Architecture
    parameters: int
    active_parameters: int
    embedding_parameters: int
    weight_bytes: int
    training_state_bytes: int
    largest_context: int | None
    figures: dict[int, ContextFigures]


@dataclass(frozen=True)
class Plan:
    """The columns of all architectures, and what they were planned for."""

    settings: PlanSettings
    hardware: Hardware
    columns: list[Column]

    @property
    def reference(self) -> Column:
        """The column that ratios refer to: the one named `transformer`, or else the first."""
        return next((column for column in self.columns if column.name == "transformer"), self.columns[0])

    def ratio(self, column: Column, context: int, figure: str) -> float:
        """A column's figure, by its name in `ContextFigures`, as a multiple of the reference's."""
        return getattr(column.figures[context], figure) / getattr(self.reference.figures[context], figure)

    def as_json(self) -> dict[str, Any]:
        """The plan as `--json` writes it."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "hardware": {
                "name": self.hardware.name,
                "memory_bytes": self.hardware.memory,
                "gemm_flops_per_second": self.hardware.gemm,
                "bandwidth_bytes_per_second": self.hardware.bandwidth,
            },
            "reference": self.reference.name,
            "architectures": [self._column_json(column) for column in self.columns],
        }

    def _column_json(self, column: Column) -> dict[str, Any]:
        rows = [
            asdict(figures) | {"ratios": {name: self.ratio(column, context, name) for name in RATIOS}}
            for context, figures in column.figures.items()
        ]
        return vars(column) | {"architecture": column.architecture.model_dump(mode="json"), "figures": rows}


def make_plan(architectures: Mapping[str, Architecture], hardware: Hardware, settings: PlanSettings) -> Plan:
    """Compute all figures.

    Args:
        architectures: at least one, by the names that their columns get.
    """
    return Plan(settings, hardware, [_column(name, a, hardware, settings) for name, a in architectures.items()])


def _column(name: str, a: Architecture, hardware: Hardware, settings: PlanSettings) -> Column:
    counts, element = parameters(a), bytes_per_kv_element(a, settings.kv_dtype or settings.dtype)
    weights = counts.total * settings.bytes_per_weight
    return Column(
        name=name,
        architecture=a,
        parameters=counts.total,
        active_parameters=counts.active,
        embedding_parameters=counts.embedding,
        weight_bytes=weights,
        training_state_bytes=optimizer_bytes(a),
        largest_context=largest_context(a, settings.batch, hardware.memory - weights, element),
        figures={context: figures_at(a, context, hardware, settings) for context in sorted(set(settings.contexts))},
    )


def figures_at(a: Architecture, context: int, hardware: Hardware, settings: PlanSettings) -> ContextFigures:
    """The figures of an architecture at one context length."""
    weight, element = settings.bytes_per_weight, bytes_per_kv_element(a, settings.kv_dtype or settings.dtype)
    room, kept = hardware.memory - parameters(a).total * weight, kv_bytes(a, context, element)
    prefill = prefill_rate(a, hardware, context, weight, element)
    decode = decode_rate(a, hardware, context, settings.batch, weight, element)
    return ContextFigures(
        context=context,
        training_flops_per_token=training_flops(a, context),
        prefill_flops_per_token=prefill_flops(a, context) / context,
        decode_flops_per_token=decode_flops(a, context),
        kv_bytes_per_sequence=kept,
        kv_bytes=settings.batch * kept,
        fits=settings.batch * kept <= room,
        largest_batch=largest_batch(a, context, room, element),
        training_tokens_per_second=training_rate(a, hardware, context),
        prefill_tokens_per_second=prefill.tokens_per_second,
        prefill_bound=prefill.bound,
        decode_tokens_per_second=decode.tokens_per_second,
        decode_bound=decode.bound,
    )
