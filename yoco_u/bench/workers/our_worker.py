"""The worker of our own engine, through `yoco_u.bench.timed_engine`."""

from typing import Any

import torch
from gpu_case import measured
from worker_protocol import Case, Job, Run, longest, most_tokens, serve

from yoco_u.architecture import Architecture
from yoco_u.bench.timed_engine import TimedEngine
from yoco_u.version import __version__

WARM_TOKENS = {"cpu": 256, "cuda": 20_000}  # on a GPU several chunks, so that every kernel is compiled


def start(job: Job) -> tuple[Run, dict[str, Any]]:
    torch.set_num_threads(job["threads"])
    engine = TimedEngine(
        Architecture.model_validate(job["model"]),
        model=job["checkpoint"],
        dtype=job["dtype"],
        weights=job["weights"],
        cache_tokens=most_tokens(job),
        sequences=max(case.get("batch", 1) for case in job["cases"]),
        num_loops=job["num_loops"],
        device=job["device"],
        block_size=job["block_size"],
    )
    engine.prefill(min(WARM_TOKENS.get(torch.device(job["device"]).type, 256), longest(job) - 1))

    def seconds(case: Case) -> float:
        if case["kind"] == "prefill":
            return engine.prefill(case["tokens"], case["depth"])
        return engine.decode(case["batch"], case["context"], case["steps"])

    def run(case: Case) -> dict[str, Any]:
        return measured(job["device"], lambda: {"seconds": seconds(case)})

    return run, {"version": __version__, "bytes_per_weight": engine.bytes_per_weight}


if __name__ == "__main__":
    serve(start)
