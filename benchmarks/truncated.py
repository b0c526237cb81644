"""Truncated backpropagation: time and memory of training steps with gradients through the last loops alone, against all loops.

    python benchmarks/truncated.py
    python benchmarks/truncated.py --quick        # a smaller model, not compiled, in under a minute

A step is forward, backward, clipping and fused AdamW of a YOCO-U, with bfloat16 autocast where the CPU multiplies bfloat16.
Each round runs all cases in turn, so that noise of the machine meets all alike; times are the best of all rounds. Ratios are to
the same loop count with gradients through all loops. Memory is the most that a step holds at a time beyond weights and AdamW's
moments, by torch's record of what is allocated and freed.
"""

from collections.abc import Callable
from typing import Any

from common import count, parser, seconds, show, write
from torch.profiler import ProfilerActivity, profile
from training import DTYPE, step

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import preset
from yoco_u.budget import forward_flops
from yoco_u.errors import in_one_line
from yoco_u.training.parallelize import compile_model, truncate_backpropagation

LOOPS, LAST = (3, 5, 8), (None, 2, 1)


def main() -> None:
    arguments = parser(__doc__, "truncated")
    arguments.add_argument("--size", help="of the YOCO-U; 8m by default, quickstart with --quick")
    arguments.add_argument("--length", type=count, help="tokens per row; 1024 by default, 512 with --quick")
    arguments.add_argument("--rows", type=count, default=4, help="rows per step")
    arguments.add_argument("--rounds", type=count, default=3)
    arguments.add_argument("--quick", action="store_true")
    chosen = arguments.parse_args()
    size, length = chosen.size or ("quickstart" if chosen.quick else "8m"), chosen.length or (512 if chosen.quick else 1024)

    rows = measure(size, length, chosen.rows, chosen.rounds, "off" if chosen.quick else "auto")
    show(f"training steps of yoco_u {size}, {chosen.rows} rows of {length} tokens, {DTYPE}", rows)
    write(chosen.out, {"size": size, "length": length, "rows_per_step": chosen.rows, "dtype": str(DTYPE), "rows": rows})


def measure(size: str, length: int, batch_rows: int, rounds: int, compilation: str) -> list[dict[str, Any]]:
    """One row for each loop count and number of loops with gradients."""
    architecture = preset("yoco_u", size)
    model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture))
    compile_model(model, compilation, model.device)
    steps = {
        loops: step(model, architecture, batch_rows, length, use_cache=False, num_loops=loops, return_logits=False)
        for loops in LOOPS
    }
    times: dict[tuple[int, int | None], list[float]] = {}
    memory: dict[tuple[int, int | None], int] = {}
    for _ in range(rounds):
        for loops, call in steps.items():
            for last in LAST:
                truncate_backpropagation(model, last)
                times.setdefault((loops, last), []).extend(seconds(call, 2))
                if (loops, last) not in memory:
                    memory[loops, last] = peak(call)
    rows = []
    for (loops, last), found in times.items():
        whole, part = (forward_flops(architecture.with_loops(n), length) for n in (loops, last or loops))
        rows.append({
            "T": loops,
            "gradients through": f"{last} loop{'s' if last > 1 else ''}" if last else "all loops",
            "seconds": min(found),
            "time": min(found) / min(times[loops, None]),
            "model FLOPs": (whole + 2 * part) / (3 * whole),
            "peak MiB": memory[loops, last] / 2**20,
            "memory": memory[loops, last] / memory[loops, None],
        })  # fmt: skip
    return rows


def peak(call: Callable[[], object]) -> int:
    """The most bytes that are allocated at a time during a call, beyond those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    in_one_line(main)
