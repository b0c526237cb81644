"""Decoding with drafts beside plain decoding, where drafts are always right and where they fail.

    python benchmarks/speculation.py

prints the tokens per second of both, measured in turns, and their ratio, and writes JSON. The model is the preset `yoco_u`
with random weights and wide open gates of its loops, so that one loop gives something else than three:

- drafts of both kinds are right where the output is one token again and again, by its bias;
- drafts by loops fail in greedy decoding, and drafts from the prompt where the output is drawn evenly from eight tokens, so
  that most of its n-grams came before and went on otherwise.

Lengths are chosen as ever, by what was accepted and by the times of the steps before.
"""

import statistics
from typing import Any

import torch
from common import count, decode, parser, show, write
from rich.progress import track

from yoco_u.architecture import preset
from yoco_u.errors import in_one_line
from yoco_u.inference import Engine, EngineSettings
from yoco_u.model import YocoUConfig, YocoUForCausalLM

SAME = {"temperature": 0.0, "logit_bias": {0: 100.0}}
EVENLY = {"temperature": 1.0, "logit_bias": dict.fromkeys(range(8), 100.0)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "loops, right": ("loops", SAME),
    "loops, wrong": ("loops", {"temperature": 0.0}),
    "prompt, right": ("prompt", SAME),
    "prompt, wrong": ("prompt", EVENLY),
}
"""By name: how tokens are drafted, and how they are sampled."""


def main() -> None:
    arguments = parser(__doc__, "speculation")
    arguments.add_argument("--size", default="100m")
    arguments.add_argument("--loops", type=count, default=3)
    arguments.add_argument("--dtype", default="auto")
    arguments.add_argument("--context", type=count, default=128, help="tokens of each prompt")
    arguments.add_argument("--tokens", type=count, default=256, help="tokens of each output")
    arguments.add_argument("--batches", type=count, nargs="+", default=[1, 16])
    arguments.add_argument("--rounds", type=count, default=5)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = arguments.parse_args()

    rows = []
    for name in chosen.cases:
        by, sampling = CASES[name]
        subject = engine(chosen)
        for batch in chosen.batches:
            decode(subject, batch, chosen, {"drafts": by, **sampling})  # warms up, and learns what is accepted
            before = subject.speculation.accepted, subject.speculation.rejected
            rates: dict[str, list[float]] = {"none": [], by: []}
            for _ in track(range(chosen.rounds), description=f"{name}, batch {batch}"):
                for drafts, found in rates.items():
                    found.append(decode(subject, batch, chosen, {"drafts": drafts, **sampling})[0])
            accepted = subject.speculation.accepted - before[0]
            drafted = accepted + subject.speculation.rejected - before[1]
            plain, drafting = rates.values()
            rows.append(
                {
                    "drafts": name,
                    "batch": batch,
                    "plain, tokens/s": statistics.median(plain),
                    "with drafts, tokens/s": statistics.median(drafting),
                    "ratio": statistics.median(b / a for a, b in zip(plain, drafting, strict=True)),
                    "drafted": drafted,
                    "accepted": accepted,
                }
            )
    show(f"YOCO-U, {chosen.size}, T = {chosen.loops}, {chosen.tokens} tokens behind {chosen.context}", rows)
    write(chosen.out, {"size": chosen.size, "loops": chosen.loops, "tokens": chosen.tokens, "rows": rows})


def engine(chosen: Any) -> Engine:
    torch.manual_seed(0)
    architecture = preset("yoco_u", chosen.size, loops=chosen.loops, loop_gate=5.0)
    model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture)).eval()
    sequences = max(chosen.batches)
    cache = sequences * (chosen.context + chosen.tokens + 64)
    settings = EngineSettings(dtype=chosen.dtype, cache_tokens=cache, max_num_seqs=sequences, prefix_caching=False)
    return Engine(model, None, settings)


if __name__ == "__main__":
    in_one_line(main)
