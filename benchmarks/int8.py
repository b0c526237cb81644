"""int8 weights beside bfloat16 weights in our engine: prefill, and decode of 1 and 16 sequences.

    python benchmarks/int8.py

prints the tokens per second of both, measured in turns, and their ratio, and writes JSON. Both models are the preset `yoco_u`
with random weights. `yoco-u evaluate RUN --weights int8 --num-loops 1 --num-loops 3` tells what int8 costs in perplexity at
each loop count.
"""

import statistics
from collections.abc import Callable
from functools import partial

from common import count, parser, show, write
from rich.progress import track

from yoco_u.architecture import preset
from yoco_u.bench.timed_engine import TimedEngine
from yoco_u.errors import in_one_line

STEPS = 32
WEIGHTS = ("bfloat16", "int8")


def main() -> None:
    arguments = parser(__doc__, "int8")
    arguments.add_argument("--size", default="100m")
    arguments.add_argument("--context", type=count, default=4096)
    arguments.add_argument("--batches", type=count, nargs="+", default=[1, 16])
    arguments.add_argument("--rounds", type=count, default=7)
    chosen = arguments.parse_args()

    sequences = max(chosen.batches)
    engines = {
        weights: TimedEngine(
            preset("yoco_u", chosen.size),
            model=None,
            dtype="bfloat16",
            weights=weights,
            cache_tokens=(chosen.context + 2 * STEPS) * sequences,
            sequences=sequences,
            num_loops=None,
        )
        for weights in WEIGHTS
    }
    cases: dict[str, Callable[[TimedEngine], float]] = {
        f"prefill {chosen.context}": lambda e: chosen.context / e.prefill(chosen.context)
    }
    for batch in chosen.batches:
        cases[f"decode, batch {batch}"] = partial(decode_rate, batch=batch, context=chosen.context)
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in track(range(chosen.rounds), description="rounds"):
        for case, measure in cases.items():
            for weights, engine in engines.items():
                rates.setdefault((case, weights), []).append(measure(engine))

    rows = []
    for case in cases:
        plain, whole = (rates[case, weights] for weights in WEIGHTS)
        ratio = statistics.median(b / a for a, b in zip(plain, whole, strict=True))
        rows.append(
            {"": case, **{f"{w}, tokens/s": statistics.median(rates[case, w]) for w in WEIGHTS}, "int8 to bfloat16": ratio}
        )
    show(f"YOCO-U, {chosen.size}, context {chosen.context}", rows)
    write(chosen.out, {"context": chosen.context, "rows": rows})


def decode_rate(engine: TimedEngine, batch: int, context: int) -> float:
    return batch * STEPS / engine.decode(batch, context, STEPS)


if __name__ == "__main__":
    in_one_line(main)
