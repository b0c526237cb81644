"""The worker of our own engine, through `yoco_u.bench.timed_engine`."""

from typing import Any

import torch
from worker_protocol import Case, Job, Run, most_tokens, serve

from yoco_u.architecture import Architecture
from yoco_u.bench.timed_engine import TimedEngine
from yoco_u.version import __version__


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
    )
    engine.prefill(min(256, most_tokens(job) - 1))

    def run(case: Case) -> dict[str, Any]:
        if case["kind"] == "prefill":
            return {"seconds": engine.prefill(case["tokens"], case["depth"])}
        return {"seconds": engine.decode(case["batch"], case["context"], case["steps"])}

    return run, {"version": __version__, "bytes_per_weight": engine.bytes_per_weight}


if __name__ == "__main__":
    serve(start)
