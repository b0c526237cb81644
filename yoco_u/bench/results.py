"""From seconds to the figures that are compared: tokens per second, shares of the ceilings, ratios to the first engine."""

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from yoco_u.bench.cases import Case, Prefill
from yoco_u.bench.run import CaseResult, Measurement
from yoco_u.budget import decode_bytes, parameters, prefill_flops
from yoco_u.device import environment


@dataclass(frozen=True)
class Row:
    """One engine on one case, with the figures that the table and the JSON show.

    Attributes:
        is_ours: see `BenchEngine`.
        parameters: how many parameters the engine's model has.
        kind: prefill or decode.
        context: tokens of the prompt, those before it included; or the context behind which tokens were decoded.
        depth: tokens before the prompt that were not computed; 0 for a decode.
        failure: why there are no figures, or none of a round and those behind it, as `word: explanation`.
        seconds: the time of each round.
        tokens_per_second: prompt tokens, or new tokens of all sequences together, by the median of the rounds.
        rate: model FLOP/s of a prefill; for a decode the bytes that its steps must read, per second.
        of_ceiling: `rate` as a share of the machine's rate of matrix products, or of its memory's read rate.
        reference_ratio: how many times as fast the benchmark's first engine is on this case.
        peak_bytes, kv_bytes: see `CaseResult`.
        way: the way that was the fastest, for an engine that was measured in several.
    """

    engine: str
    is_ours: bool
    parameters: int
    kind: str
    context: int
    depth: int
    batch: int
    failure: str | None
    seconds: list[float]
    tokens_per_second: float | None
    rate: float | None
    of_ceiling: float | None
    reference_ratio: float | None
    peak_bytes: int | None
    kv_bytes: int
    way: str | None


def rows_of(measurement: Measurement) -> list[Row]:
    """One row for each case of each engine: all engines of a case together, in the order of the benchmark."""
    results = measurement.results
    engines = list(dict.fromkeys(name for name, _ in results))
    cases = list(dict.fromkeys(case for _, case in results))
    pairs = [(name, case) for case in cases for name in engines if (name, case) in results]
    return [_row(measurement, results[name, case], results.get((engines[0], case))) for name, case in pairs]


def _row(measurement: Measurement, result: CaseResult, reference: CaseResult | None) -> Row:
    case, engine = result.case, result.engine
    prefill = isinstance(case, Prefill)
    seconds = median(result.seconds) if result.seconds else None
    rate = ceiling = None
    if seconds is not None:
        rate = _work(measurement, result) / seconds
        ceiling = measurement.ceiling.gemm if prefill else measurement.ceiling.memory
    return Row(
        engine=engine.name,
        is_ours=engine.is_ours,
        parameters=parameters(engine.architecture).total,
        kind=case.kind,
        context=case.context,
        depth=case.depth if isinstance(case, Prefill) else 0,
        batch=case.batch,
        failure=result.failure,
        seconds=result.seconds,
        tokens_per_second=None if seconds is None else _new_tokens(case) / seconds,
        rate=rate,
        of_ceiling=None if rate is None or ceiling is None else rate / ceiling,
        reference_ratio=seconds / median(reference.seconds) if seconds and reference and reference.seconds else None,
        peak_bytes=result.peak_bytes,
        kv_bytes=result.kv_bytes,
        way=result.details.get("way"),
    )


def _new_tokens(case: Case) -> int:
    return case.tokens if isinstance(case, Prefill) else case.batch * case.steps


def _work(measurement: Measurement, result: CaseResult) -> float:
    """Model FLOPs of a prefill, or the bytes that all steps of a decode must read."""
    a, case, size = result.engine.architecture, result.case, measurement.settings.bytes_per_element
    if isinstance(case, Prefill):
        return prefill_flops(a, case.context) - (prefill_flops(a, case.depth) if case.depth else 0)
    bytes_per_weight = measurement.about[result.engine.name].get("bytes_per_weight", size)
    return case.steps * decode_bytes(a, case.context, case.batch, bytes_per_weight, size)


def as_json(measurement: Measurement) -> dict[str, Any]:
    """The benchmark as `--json` writes it: environment, settings, ceilings, engines and rows, as far as it was measured."""
    ceilings = [
        {"gemm_flops_per_second": c.gemm, "memory_bytes_per_second": c.memory, "busy_cpus": c.busy}
        for c in measurement.ceilings
    ]
    engines = {result.engine.name: result.engine for result in measurement.results.values()}
    return {
        "environment": environment(torch.device(measurement.settings.device)),
        "settings": measurement.settings.model_dump(mode="json"),
        "ceilings": ceilings,
        "engines": {
            name: {"architecture": engine.architecture.model_dump(mode="json"), "about": measurement.about.get(name)}
            for name, engine in engines.items()
        },
        "rows": [vars(row) for row in rows_of(measurement)],
    }
