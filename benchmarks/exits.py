"""Decoding with tokens that leave the loop, beside plain loop counts.

    python benchmarks/exits.py

prints tokens per second and the loops that a token runs on average, measured in turns, and writes JSON. The model is the preset
`yoco_u` with random weights. Its exits are random heads, whose scores are log-normal, so that about a fifth or half of the
tokens leave after each loop at the thresholds 0.43 and 1, none at 0, and all after the first loop at 1e30.
"""

import statistics
from typing import Any

import torch
from common import count, decode, parser, show, write
from rich.progress import track

from yoco_u.architecture import preset
from yoco_u.errors import in_one_line
from yoco_u.inference import Engine, EngineSettings, RequestOutput
from yoco_u.inference.exits import Exits
from yoco_u.model import YocoUConfig, YocoUForCausalLM

THRESHOLDS = (0.0, 0.43, 1.0, 1e30)


def main() -> None:
    arguments = parser(__doc__, "exits")
    arguments.add_argument("--size", default="100m")
    arguments.add_argument("--loops", type=count, default=3)
    arguments.add_argument("--dtype", default="auto")
    arguments.add_argument("--context", type=count, default=128, help="tokens of each prompt")
    arguments.add_argument("--tokens", type=count, default=64, help="tokens of each output")
    arguments.add_argument("--batches", type=count, nargs="+", default=[1, 16])
    arguments.add_argument("--rounds", type=count, default=3)
    chosen = arguments.parse_args()

    subject = engine(chosen)
    cases: dict[str, dict[str, Any]] = {f"T = {loops}": {"num_loops": loops} for loops in range(1, chosen.loops + 1)}
    for threshold in THRESHOLDS:
        cases[f"auto, threshold {threshold:g}"] = {"num_loops": "auto", "exit_threshold": threshold}
    rows = []
    for batch in chosen.batches:
        rates: dict[str, list[float]] = {name: [] for name in cases}
        means = {}
        for turn in track(range(chosen.rounds + 1), description=f"batch {batch}"):
            for name, loops in cases.items():
                rate, requests = decode(subject, batch, chosen, loops)
                means[name] = mean_loops(requests)
                if turn:  # the first one warms up
                    rates[name].append(rate)
        full = f"T = {chosen.loops}"
        for name, found in rates.items():
            ratio = statistics.median(own / plain for own, plain in zip(found, rates[full], strict=True))
            rate = statistics.median(found)
            rows.append({"batch": batch, "loops": name, "mean loops": means[name], "tokens/s": rate, f"of {full}": ratio})
    show(f"YOCO-U, {chosen.size}, {chosen.tokens} tokens behind {chosen.context}", rows)
    write(chosen.out, {"size": chosen.size, "loops": chosen.loops, "tokens": chosen.tokens, "rows": rows})


def engine(chosen: Any) -> Engine:
    torch.manual_seed(0)
    architecture = preset("yoco_u", chosen.size, loops=chosen.loops)
    model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture)).eval()
    width = architecture.hidden_size
    heads = tuple((*(torch.randn(width) * width**-0.5).tolist(), 0.0) for _ in range(chosen.loops - 1))
    exits = Exits(num_loops=chosen.loops, score="divergence", threshold=0.0, heads=heads)
    sequences = max(chosen.batches)
    cache = sequences * (chosen.context + chosen.tokens + 192)  # so that all run at once
    settings = EngineSettings(dtype=chosen.dtype, cache_tokens=cache, max_num_seqs=sequences, prefix_caching=False)
    return Engine(model, None, settings, exits)


def mean_loops(requests: list[RequestOutput]) -> float:
    """Loops that a token ran on average."""
    return statistics.fmean(count for request in requests for count in request.outputs[0].loops)


if __name__ == "__main__":
    in_one_line(main)
