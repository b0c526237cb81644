"""Speed beside other programs: decoding, prefill and training, while no, one and two other processes keep a core busy.

    python benchmarks/busy.py

prints the rates on the idle machine, and those beside other processes as shares of them. Two processes take turns: one as
`yoco-u` runs, and one with the number of threads and the spinning that torch and OpenMP choose by themselves. Each round
measures all cases of both at all loads, so that noise of the machine meets all alike. Run it where nothing else runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import count, parser, show, write
from rich.progress import Progress

from yoco_u.architecture import SIZES
from yoco_u.errors import in_one_line

LOADS = (0, 1, 2)
CONTEXT = 512
CASES = ("decode, batch 1", "decode, batch 16", "prefill", "training")
WARM_SECONDS = 2.5
OPENMP_SPINS = "300000"  # what libgomp does if nothing is set


def main() -> None:
    arguments = parser(__doc__, "busy")
    arguments.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["test", "100m"])
    arguments.add_argument("--rounds", type=count, default=5)
    arguments.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.worker:
        work()
        return

    workers = {
        "yoco-u": Worker({}),
        "torch alone": Worker({"OMP_NUM_THREADS": default_threads(), "GOMP_SPINCOUNT": OPENMP_SPINS}),
    }
    cases = [(size, case) for size in chosen.sizes for case in CASES]
    rates: dict[tuple[str, str, str, int], list[float]] = {}
    with Progress() as bars:
        task = bars.add_task("measuring", total=(chosen.rounds + 1) * len(LOADS) * len(cases) * len(workers))
        for number in range(chosen.rounds + 1):
            for load in LOADS:
                with busy_processes(load):
                    for size, case in cases:
                        for name, worker in workers.items():
                            rate = worker.measure(size, case)
                            if number:  # the first round warms up
                                rates.setdefault((size, case, name, load), []).append(rate)
                            bars.advance(task)
    rows = [
        row(size, case, {load: rates[size, case, name, load] for load in LOADS}, name)
        for size, case in cases
        for name in workers
    ]
    for one, peer in zip(rows[::2], rows[1::2], strict=True):
        one["idle, against torch alone"] = one["tokens/s"] / peer["tokens/s"]
        peer["idle, against torch alone"] = 1.0
    show(f"beside busy processes, context {CONTEXT}, {os.cpu_count()} cores", rows)
    write(chosen.out, {"context": CONTEXT, "rounds": chosen.rounds, "rows": rows})


def row(size: str, case: str, rates: dict[int, list[float]], name: str) -> dict[str, Any]:
    idle = statistics.median(rates[0])
    shares = {f"beside {load}": statistics.median(rates[load]) / idle for load in LOADS[1:]}
    return {"size": size, "": case, "threads and spinning": name, "tokens/s": idle} | shares


def default_threads() -> str:
    """The number of threads that torch chooses."""
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment()).stdout.strip()


def clean_environment() -> dict[str, str]:
    """The environment without what is said in it about threads."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that each keep one core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Worker:
    """A process that measures what it is asked for."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment() | environment,
        )  # fmt: skip

    def measure(self, size: str, case: str) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([size, case]), file=self._process.stdin, flush=True)
        return float(json.loads(self._process.stdout.readline()))


def work() -> None:
    """Answer each question on stdin with a rate on stdout."""
    import yoco_u  # before torch, as the command does: it sets how long OpenMP's threads spin  # noqa: F401

    measures: dict[str, dict[str, Callable[[], float]]] = {}
    for line in sys.stdin:
        size, case = json.loads(line)
        if size not in measures:
            measures[size] = measures_of(size)
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_SECONDS:  # in which it is noticed what else runs
            rate = measures[size][case]()
        print(json.dumps(rate), flush=True)


def measures_of(size: str) -> dict[str, Callable[[], float]]:
    """What each case measures, by the case's name."""
    import torch
    from training import step

    from yoco_u import YocoUConfig, YocoUForCausalLM
    from yoco_u.architecture import preset
    from yoco_u.bench.timed_engine import TimedEngine
    from yoco_u.inference import EngineSettings
    from yoco_u.training.other_programs import OtherPrograms

    architecture, steps = preset("yoco_u", size), 30 if size == "test" else 8
    dtype = str(EngineSettings().torch_dtype(architecture, torch.device("cpu"))).removeprefix("torch.")
    engine = TimedEngine(
        architecture, model=None, dtype=dtype, weights=dtype, cache_tokens=(CONTEXT + 200) * 16, sequences=16, num_loops=None
    )
    one_step = step(YocoUForCausalLM(YocoUConfig.from_architecture(architecture)), architecture, 1, CONTEXT, use_cache=False)

    others = OtherPrograms(True, print)  # as with training.follow_free_cores

    def train() -> float:
        others.mind()
        begin = time.perf_counter()
        repeats = 4 if size == "test" else 1
        for _ in range(repeats):
            one_step()
        return CONTEXT * repeats / (time.perf_counter() - begin)

    return {
        "decode, batch 1": lambda: steps / engine.decode(1, CONTEXT, steps),
        "decode, batch 16": lambda: 16 * steps / engine.decode(16, CONTEXT, steps),
        "prefill": lambda: CONTEXT / engine.prefill(CONTEXT),
        "training": train,
    }


if __name__ == "__main__":
    in_one_line(main)
