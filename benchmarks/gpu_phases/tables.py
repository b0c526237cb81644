"""The paper's Tables 8 to 10: prefill, decode and KV of every architecture, measured as `yoco-u bench --paper` does."""

from collections.abc import Sequence
from statistics import median

from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.bench.cases import BenchSettings, Case, Decode, Prefill
from yoco_u.bench.engines import BenchEngine, our_engines
from yoco_u.bench.paper_tables import paper_cases
from yoco_u.bench.run import Benchmark, CaseResult
from yoco_u.device import find_device, memory_bytes

_SECONDS_TO_MEASURE = 15.0  # an engine is not loaded if fewer remain
_LONGEST_CASE = 120.0  # seconds


def run(record: Record, scale: Scale) -> None:
    settings = settings_of(scale)
    memory = memory_bytes(find_device(scale.device))
    for engine in our_engines(settings):
        measure(record, settings, engine, paper_cases(engine.architecture, settings, memory))


def settings_of(scale: Scale) -> BenchSettings:
    return BenchSettings(
        size=scale.size, architectures=scale.architectures, contexts=scale.contexts, batches=(scale.batch,),
        device=str(find_device(scale.device)), steps=scale.steps, block_size=scale.block_size, rounds=scale.rounds,
    )  # fmt: skip


def measure(record: Record, settings: BenchSettings, engine: BenchEngine, cases: Sequence[Case]) -> None:
    """Measure an engine's cases that have no figure yet, in their order; each figure is kept as soon as its rounds are over."""
    left = [case for case in cases if record.is_due(name_of(engine, case))]
    if not left:
        return
    if record.remaining < _SECONDS_TO_MEASURE:
        for case in left:
            record.measure(name_of(engine, case), dict, least=_SECONDS_TO_MEASURE)
        return
    limit = max(1.0, min(_LONGEST_CASE, record.remaining - 5))
    benchmark = Benchmark(settings.model_copy(update={"time_limit": limit}), [engine], {engine.name: left})
    benchmark.run(lambda engine, case: _keep(record, benchmark, final=False))
    _keep(record, benchmark, final=True)


def name_of(engine: BenchEngine, case: Case) -> str:
    if isinstance(case, Prefill):
        behind = f" behind {case.depth}" if case.depth else ""
        return f"{engine.name}, prefill {case.tokens}{behind}"
    return f"{engine.name}, decode {case.context}, batch {case.batch}"


def _keep(record: Record, benchmark: Benchmark, final: bool) -> None:
    """Keep each case after its first round, and once more, with the median of all rounds, in the end."""
    for result in benchmark.measurement.results.values():
        name = name_of(result.engine, result.case)
        if not (result.seconds or result.failure):
            continue
        known = record.figures.get(name, {})
        changed = (known.get("seconds"), known.get("failure")) != (result.seconds or None, result.failure)
        if record.is_due(name) or (final and changed):
            record.keep(name, _figure(result))


def _figure(result: CaseResult) -> Figure:
    case = result.case
    found: Figure = {"kv_bytes": result.kv_bytes, "batch": case.batch, "context": case.context}
    if result.failure:
        found["failure"] = result.failure
    if not result.seconds:
        return found
    tokens = case.batch * case.steps if isinstance(case, Decode) else case.tokens
    return {
        "engine": result.engine.name,
        "kind": case.kind,
        "tokens_per_second": tokens / median(result.seconds),
        "seconds": list(result.seconds),
        "peak_bytes": result.peak_bytes,
        **found,
        **result.details,
    }
