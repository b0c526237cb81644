"""Where the time goes: one decode step and one chunk of a prompt of YOCO-U under torch's profiler, kernel by kernel."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.architecture import preset
from yoco_u.bench.timed_engine import TimedEngine
from yoco_u.device import find_device, synchronize

KERNELS = 30
_WARM_STEPS = 6  # the second decode step of a batch records its CUDA graphs


def run(record: Record, scale: Scale) -> None:
    device, contexts = find_device(scale.device), scale.contexts
    context = max(c for c in contexts if c <= 65536)
    timed = TimedEngine(
        preset("yoco_u", scale.size), model=None, dtype="bfloat16", weights="bfloat16", num_loops=None, device=scale.device,
        cache_tokens=scale.batch * (contexts[-1] + 2 * _WARM_STEPS), sequences=scale.batch, block_size=scale.block_size,
    )  # fmt: skip
    chunk = min(timed.engine.settings.max_batched_tokens, contexts[0])
    for length in dict.fromkeys((contexts[0], context, contexts[-1])):
        name = f"decode step, batch {scale.batch}, context {length}"
        record.measure(name, partial(_decode, timed, device, scale.batch, length))
    for depth in dict.fromkeys((0, context - chunk)):
        record.measure(f"prefill of {chunk} tokens behind {depth}", partial(_prefill, timed, device, chunk, depth))
    (record.path.parent / "profile.txt").write_text(as_text(record.figures), encoding="utf-8")


def _decode(timed: TimedEngine, device: torch.device, batch: int, context: int) -> Figure:
    engine = timed.engine
    requests = [engine.add(timed.tokens(context), timed.params(_WARM_STEPS + 8)) for _ in range(batch)]
    try:
        engine.fill_cache(context - 1)
        for _ in range(_WARM_STEPS):
            engine.step()
        begin = time.perf_counter()
        engine.step()
        return {"seconds_alone": time.perf_counter() - begin} | profiled(device, engine.step)
    finally:
        for request in requests:
            engine.abort(request)


def _prefill(timed: TimedEngine, device: torch.device, chunk: int, depth: int) -> Figure:
    timed.prefill(chunk, depth)
    alone = timed.prefill(chunk, depth)
    engine = timed.engine
    request = engine.add(timed.tokens(depth + chunk), timed.params(2))
    try:
        if depth:
            engine.fill_cache(depth)
        return {"seconds_alone": alone} | profiled(device, engine.step)
    finally:
        engine.abort(request)


def profiled(device: torch.device, call: Callable[[], Any]) -> Figure:
    """One call, by kernel.

    Returns:
        `seconds` from the first kernel's begin to the last one's end; `busy_seconds` in which at least one kernel ran;
        `idle_share` of the time in which none did; and `kernels`, those that took the most time together, each with its number
        of calls. On a CPU the kernels are torch's operators. The profiler makes launches slower, so beside graphs that are
        replayed, gaps are longer than without it: `seconds_alone` is the time of such a call without the profiler.

    Raises:
        RuntimeError: if the profiler saw no kernel.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind and event.time_range.elapsed_us() > 0]
    if not events:
        raise RuntimeError("the profiler saw no kernel; is its tracing of the device allowed here?")
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    whole, busy = max(end for _, end in spans) - spans[0][0], covered(spans)
    totals: dict[str, list[float]] = defaultdict(list)
    for event in events:
        totals[event.name].append(event.time_range.elapsed_us())
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return {
        "seconds": whole / 1e6,
        "busy_seconds": busy / 1e6,
        "idle_share": 1 - busy / whole,
        "launches": len(events),
        "kernels": [{"name": name, "calls": len(times), "microseconds": sum(times)} for name, times in ranked],
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the spans (begin, end) lasts; they are sorted by their begin."""
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def as_text(figures: dict[str, Figure]) -> str:
    """The profiles as tables for readers."""
    lines = []
    for name, figure in figures.items():
        if "failure" in figure:
            lines += [f"{name}: {figure['failure']}", ""]
            continue
        lines.append(
            f"{name}: {figure['seconds'] * 1e3:.3f} ms, of which {figure['idle_share']:.1%} idle, {figure['launches']} kernels"
        )
        for kernel in figure["kernels"]:
            share = kernel["microseconds"] / 1e6 / max(figure["seconds"], 1e-12)
            lines.append(f"{kernel['microseconds'] / 1e3:10.3f} ms {share:6.1%} {kernel['calls']:6d}x  {kernel['name'][:90]}")
        lines.append("")
    return "\n".join(lines)
