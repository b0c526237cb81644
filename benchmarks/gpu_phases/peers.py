"""Other engines on a Llama of the same shape: transformers with SDPA, and vLLM where it is installed."""

from dataclasses import replace

from gpu_phases.record import Record
from gpu_phases.scale import Scale
from gpu_phases.tables import measure, name_of, settings_of
from yoco_u.architecture import preset
from yoco_u.bench.cases import Case, Decode
from yoco_u.bench.engines import find_peers, peer_engines
from yoco_u.bench.paper_tables import paper_cases
from yoco_u.device import find_device, memory_bytes

_SHARE = 0.6
"""Share of the GPU's memory that batches are made for: transformers copies a layer's cache whenever a token is added to it."""

_STEPS = 32


def run(record: Record, scale: Scale) -> None:
    device = find_device(scale.device)
    on_gpu = device.type == "cuda"
    names, missing = find_peers("auto" if on_gpu else "transformers", {}, on_gpu)
    for name in missing:
        print(f"  {name} is not installed")
    settings = settings_of(scale).model_copy(update={"compile_peers": False, "rounds": 1, "steps": min(_STEPS, scale.steps)})
    transformer = preset("transformer", scale.size)
    cases = paper_cases(transformer, settings, round(_SHARE * memory_bytes(device)))
    for engine in peer_engines(settings, transformer, names, {}):
        measure(record, settings, engine, _cheapest_first(cases))
    if on_gpu:  # compiled decoding takes a minute for each case, so there is one
        compiled = settings.model_copy(update={"compile_peers": True})
        [engine] = peer_engines(compiled, transformer, ["transformers"], {})
        decode = [case for case in cases if isinstance(case, Decode)][1:2]
        engine = replace(engine, name=f"{engine.name}, compiled")
        measure(record, compiled, engine, decode)
        for case in decode:
            only_compiled(record, name_of(engine, case))


def only_compiled(record: Record, name: str) -> None:
    """Let a figure be that of compiled decoding, where the worker reports the faster way of two."""
    figure = record.figures.get(name, {"failure": "not measured"})
    if "failure" in figure or figure["way"] == "compiled":
        return
    seconds = figure["seconds_by_way"].get("compiled")
    if seconds is None:
        record.keep(name, {"failure": "decoding could not be compiled; see the messages above"})
        return
    rate = figure["tokens_per_second"] * figure["seconds_by_way"][figure["way"]] / seconds
    record.keep(name, figure | {"tokens_per_second": rate, "seconds": [seconds], "way": "compiled"})


def _cheapest_first(cases: list[Case]) -> list[Case]:
    """The longest prompt, which takes as long as all the rest together, comes last."""
    longest = max(case.context for case in cases)
    return sorted(cases, key=lambda case: (case.context == longest, case.kind == "prefill" and case.context == longest))
