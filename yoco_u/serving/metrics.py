"""Metrics in Prometheus' format: counts and times of jobs, and the state of the engine."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from yoco_u.inference import Engine
from yoco_u.serving.engine_loop import EngineLoop, Observer
from yoco_u.serving.jobs import Event, Job

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass
class _Progress:
    """Progress of one job.

    Attributes:
        begun: outputs that have had an event, by (prompt, output).
        last: time of the newest token, likewise.
        ended: number of outputs that have ended regularly.
    """

    begun: set[tuple[int, int]] = field(default_factory=set)
    last: dict[tuple[int, int], float] = field(default_factory=dict)
    ended: int = 0


class Metrics(Observer):
    """Counts what the engine loop reports. Blocks, seats and the queue are read from the engine whenever the text is made."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._jobs: dict[Job, _Progress] = {}

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"yoco_u_{name}", meaning, labels, registry=self._registry)

        def histogram(name: str, meaning: str) -> Histogram:
            return Histogram(f"yoco_u_{name}_seconds", meaning, buckets=_SECONDS, registry=self._registry)

        self._outputs = counter("outputs", "Outputs that ended, by how: stop, length, or unfinished.", "reason")
        self._rejected = counter("rejected", "Jobs that were not taken, by why.", "reason")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that the prefix cache had.")
        self._new_tokens = counter("generated_tokens", "Tokens of outputs.")
        self._first = histogram("time_to_first_token", "From a job's arrival to each output's first token.")
        self._next = histogram("inter_token", "Between two tokens of an output, on average where several came at once.")
        self._whole = histogram("job", "From a job's arrival to its end.")
        self._step = histogram("step", "One step of the engine.")
        self._registry.register(_EngineState(engine))

    def watch(self, loop: EngineLoop) -> None:
        """Show also whether the engine loop works."""
        self._registry.register(_LoopState(loop))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def event(self, job: Job, event: Event) -> None:
        progress = self._jobs.setdefault(job, _Progress())
        request, key, now = job.requests[event.prompt], (event.prompt, event.output), time.monotonic()
        if key not in progress.begun and event.output == 0:
            self._prompt_tokens.inc(len(request.prompt_token_ids))
            self._cached_tokens.inc(event.cached_tokens)
        progress.begun.add(key)
        if new := len(event.token_ids):
            if key in progress.last:
                gaps = [(now - progress.last[key]) / new] * new
            else:
                self._first.observe(now - job.begun)
                gaps = [0.0] * (new - 1)  # they came together with the first
            for gap in gaps:
                self._next.observe(gap)
            progress.last[key] = now
        progress.ended += event.finish_reason is not None
        self._new_tokens.inc(new)
        if event.finish_reason is not None:
            self._outputs.labels(event.finish_reason).inc()

    def ended(self, job: Job) -> None:
        self._whole.observe(time.monotonic() - job.begun)
        self._outputs.labels("unfinished").inc(job.num_outputs - self._jobs.pop(job, _Progress()).ended)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def step(self, seconds: float) -> None:
        self._step.observe(seconds)


class _EngineState(Collector):
    """What the engine holds at the moment at which the metrics are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler, statistics = self._engine.scheduler, self._engine.scheduler.statistics
        running, seats = len(scheduler.running), self._engine.settings.max_num_seqs
        blocks = scheduler.pool.num_blocks
        free, cached = statistics.free_blocks, statistics.cached_blocks
        yield _gauge("requests", "Outputs in the engine.", running=running, waiting=self._engine.unfinished - running)
        yield _gauge("kv_blocks", "Blocks of the paged caches.", free=free, cached=cached, held=blocks - free - cached)
        yield _gauge("window_seats", "Rows of the window rings.", held=running, free=seats - running)
        snapshots = GaugeMetricFamily("yoco_u_snapshot_bytes", "Window states kept for cached prefixes.")
        snapshots.add_metric([], scheduler.snapshots.bytes)
        yield snapshots
        yield CounterMetricFamily(
            "yoco_u_prefix_hit_tokens", "Tokens that were not computed again.", statistics.prefix_hit_tokens
        )
        runner = self._engine.runner
        yield CounterMetricFamily("yoco_u_loops", "Loops run, over all tokens that were computed.", runner.loops_run)
        yield CounterMetricFamily("yoco_u_looped_tokens", "Tokens that were computed, for which loops ran.", runner.tokens_run)
        drafted = CounterMetricFamily(
            "yoco_u_drafted_tokens", "Tokens that were drafted, by what became of them.", labels=["result"]
        )
        drafted.add_metric(["accepted"], self._engine.speculation.accepted)
        drafted.add_metric(["rejected"], self._engine.speculation.rejected)
        yield drafted
        yield CounterMetricFamily("yoco_u_preemptions", "Requests that gave way and were begun again.", statistics.preemptions)


class _LoopState(Collector):
    """Whether the engine's thread gets on with its work."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        since = self._loop.busy_since
        age = time.monotonic() - since if since is not None else 0.0
        yield GaugeMetricFamily("yoco_u_serving", "1 while requests are taken, as /health says.", self._loop.refusal is None)
        yield GaugeMetricFamily("yoco_u_step_age_seconds", "How long the step that runs has taken so far.", age)


def _gauge(name: str, meaning: str, **values: int) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"yoco_u_{name}", meaning, labels=["state"])
    for state, value in values.items():
        family.add_metric([state], value)
    return family
