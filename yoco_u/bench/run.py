"""The order of a benchmark: engines take turns, cases run from cheap to dear, and what cannot be measured is left out.

A case is left out if its KV would not fit into memory, if its engine has failed, or if shorter prompts say that it would take
too long. The reason stays in the case's result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from yoco_u.architecture import Architecture
from yoco_u.bench.cases import BenchSettings, Case, Prefill, case_as_json
from yoco_u.bench.ceilings import Ceilings, measure_ceilings
from yoco_u.bench.engines import BenchEngine
from yoco_u.bench.process import WorkerFailed, WorkerProcess, WorkerTimedOut
from yoco_u.budget import kv_bytes, parameters, prefill_flops
from yoco_u.device import memory_bytes

CHEAP_SECONDS = {"cpu": 20.0, "cuda": 4.0}
"""By the device's type: a case that took longer than this is not measured again in further rounds."""

START_SECONDS = 600.0
"""Seconds that an engine may take to load and compile; the settings' time limit is for a case."""

SHARE_OF_MEMORY = {"cpu": 0.7, "cuda": 0.85}
"""By the device's type: a case whose keys and values take a larger share of what the weights leave is not tried."""


def kv_room(a: Architecture, settings: BenchSettings, memory: int) -> float:
    """Bytes that the keys and values of a case may take, so that weights and everything else have room beside them.

    Args:
        memory: bytes of the device.
    """
    weights = parameters(a).total * settings.bytes_per_element
    return SHARE_OF_MEMORY[torch.device(settings.device).type] * (memory - weights)


@dataclass
class CaseResult:
    """What became of one case on one engine.

    Attributes:
        kv_bytes: bytes of keys and values of all sequences together, by arithmetic.
        seconds: the time that the case took, one for each round that measured it.
        failure: why it was not measured, or not in the round that it names, in one line; the table shows what stands before
            the colon where there is no figure.
        peak_bytes: the most resident memory that the engine's processes held during the case.
        details: what else the worker answered.
    """

    engine: BenchEngine
    case: Case
    kv_bytes: int
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None
    peak_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measurement:
    """Everything that has been measured so far.

    Attributes:
        results: by the engine's name and the case; there is one for each case of each engine from the beginning.
        ceilings: the machine's ceilings before each turn of an engine; on a GPU, before it is loaded.
        about: by the engine's name, what its worker told of it.
    """

    settings: BenchSettings
    results: dict[tuple[str, Case], CaseResult]
    ceilings: list[Ceilings] = field(default_factory=list)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ceiling(self) -> Ceilings:
        """The machine's ceilings: the highest rates, and the most CPUs of other processes, of all turns."""
        gemm, memory, busy = map(max, zip(*self.ceilings, strict=True))
        return Ceilings(gemm, memory, busy)


Progress = Callable[[BenchEngine, Case | None], None]
"""Called before each case with its engine, and with None for the case before an engine is loaded."""


class Benchmark:
    """Runs all cases on all engines.

    Args:
        engines: the engines, whose names must differ.
        cases: what each engine is to run, by its name; those of one kind from the cheapest on.

    Attributes:
        measurement: everything that has been measured so far, even after an interrupt.
    """

    def __init__(self, settings: BenchSettings, engines: Sequence[BenchEngine], cases: Mapping[str, Sequence[Case]]) -> None:
        self.settings, self.engines, self.cases = settings, engines, cases
        self.device = torch.device(settings.device)
        self._memory = memory_bytes(self.device)
        size = settings.bytes_per_element
        self.measurement = Measurement(
            settings,
            {
                (e.name, c): CaseResult(e, c, c.batch * kv_bytes(e.architecture, c.context, size))
                for e in engines
                for c in cases[e.name]
            },
        )
        self._workers: dict[str, WorkerProcess] = {}
        self._broken: dict[str, str] = {}  # by the engine's name, why it could not be started

    def run(self, progress: Progress) -> Measurement:
        """Measure everything. The failure of an engine becomes part of its results and the others go on."""
        try:
            for number, engine in self._turns():
                if self.device.type == "cpu" or engine.name not in self._workers:  # which may have filled the GPU's memory
                    self.measurement.ceilings.append(measure_ceilings(self.settings.dtype, self.device))
                for case in self.cases[engine.name]:
                    progress(engine, case)
                    self._measure(engine, case, progress)
                if number == self.settings.rounds:
                    self._close(engine)
        finally:
            for engine in self.engines:
                self._close(engine)
        return self.measurement

    def _turns(self) -> Iterator[tuple[int, BenchEngine]]:
        """The engines in the order of their turns, each with the number of its round.

        Rounds go over all engines, so that noise of the machine meets all alike. If the engines do not fit into memory
        together, each has all its rounds before the next one is loaded. On a GPU they do so always: engines fill its memory
        with their caches.
        """
        rounds = range(1, self.settings.rounds + 1)
        if self._keeps_all_loaded:
            yield from ((number, engine) for number in rounds for engine in self.engines)
        else:
            yield from ((number, engine) for engine in self.engines for number in rounds)

    @property
    def _keeps_all_loaded(self) -> bool:
        """Whether the weights of all engines fit into memory together, so that each stays loaded between its turns."""
        if self.device.type != "cpu":
            return False
        weights = sum(parameters(engine.architecture).total * self.settings.bytes_per_element for engine in self.engines)
        largest = max(self._fitting_kv_bytes(engine) for engine in self.engines)
        return weights + 2 * largest < 0.5 * self._memory

    def _fitting_kv_bytes(self, engine: BenchEngine) -> int:
        """Bytes of keys and values of the engine's largest case that fits into memory."""
        results = [self.measurement.results[engine.name, case] for case in self.cases[engine.name]]
        return max((result.kv_bytes for result in results if self._fits(result)), default=0)

    def _measure(self, engine: BenchEngine, case: Case, progress: Progress) -> None:
        """Measure a case once more, or note why that cannot be done."""
        result = self.measurement.results[engine.name, case]
        if result.failure or (result.seconds and min(result.seconds) > CHEAP_SECONDS[self.device.type]):
            return
        if failure := self._broken.get(engine.name) or self._hopeless(result):
            _fail(result, failure)
            return
        try:
            worker = self._workers.get(engine.name) or self._load(engine, progress)
            answer = worker.run(case_as_json(case), self.settings.time_limit)
        except WorkerFailed as failure:
            self._workers.pop(engine.name, None)
            word = "timed out" if isinstance(failure, WorkerTimedOut) else "failed"
            _fail(result, self._broken.get(engine.name) or f"{word}: {failure}")
            return
        if "error" in answer:
            _fail(result, f"failed: {answer['error']}")
            return
        result.seconds.append(answer.pop("seconds"))
        result.peak_bytes = max(answer.pop("peak_bytes") or 0, result.peak_bytes or 0) or None
        answer.pop("max_rss_bytes", None)
        result.details = answer

    def _load(self, engine: BenchEngine, progress: Progress) -> WorkerProcess:
        progress(engine, None)
        cases = [case for case in self.cases[engine.name] if self._fits(self.measurement.results[engine.name, case])]
        job = engine.job | {"cases": [case_as_json(case) for case in cases]}
        worker = self._workers[engine.name] = WorkerProcess(engine.python, engine.script, job, torch.get_num_threads())
        try:
            self.measurement.about[engine.name] = worker.about(START_SECONDS)
        except WorkerFailed as failure:
            self._broken[engine.name] = f"failed: could not start: {failure}"
            raise
        return worker

    def _close(self, engine: BenchEngine) -> None:
        worker = self._workers.pop(engine.name, None)
        if worker is not None:
            worker.close()

    def _hopeless(self, result: CaseResult) -> str | None:
        """Why a case need not be tried, in one line; None if it should be tried."""
        if not self._fits(result):
            where = "machine" if self.device.type == "cpu" else "GPU"
            weights = parameters(result.engine.architecture).total * self.settings.bytes_per_element
            return (
                f"no memory: the KV takes {result.kv_bytes / 2**30:.1f} GiB and the weights {weights / 2**30:.1f}, "
                f"the {where} has {self._memory / 2**30:.1f}"
            )
        case, engine, limit = result.case, result.engine, self.settings.time_limit
        if not isinstance(case, Prefill) or case.depth or result.seconds:
            return None
        shorter = [
            self.measurement.results[engine.name, other]
            for other in self.cases[engine.name]
            if isinstance(other, Prefill) and not other.depth and other.tokens < case.tokens
        ]
        for one in shorter:
            if one.failure and one.failure.startswith("timed out"):
                return f"too long: {one.case.context:,} tokens took over {limit:g} s"
        nearest = max((one for one in shorter if one.seconds), key=lambda one: one.case.context, default=None)
        if nearest is None:
            return None
        tokens = nearest.case.context  # of far shorter prompts the time is not their FLOPs'
        more = prefill_flops(engine.architecture, case.tokens) / prefill_flops(engine.architecture, tokens)
        if (expected := min(nearest.seconds) * more) > limit:
            return f"too long: about {expected:,.0f} s by its rate at {tokens:,} tokens, the limit is {limit:g}"
        return None

    def _fits(self, result: CaseResult) -> bool:
        """Whether the keys and values of a case leave enough memory for the weights and everything else."""
        return result.kv_bytes < kv_room(result.engine.architecture, self.settings, self._memory)


def _fail(result: CaseResult, failure: str) -> None:
    """Note why a case was not measured; where earlier rounds have measured it, with the number of the round."""
    word, _, reason = failure.partition(":")
    result.failure = f"{word} in round {len(result.seconds) + 1}:{reason}" if result.seconds else failure
