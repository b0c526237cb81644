"""What a conversion costs before any training: the loss of a source, and of what `yoco-u convert` makes of it.

For each way in which global keys and values come about and for several numbers of global KVs: nats per token on held-out
English (documentation of installed packages) and code (their sources), the mean share of the replaced layers' keys and values
that is explained, and the bytes of the cache at 8K tokens. The documents of the evaluation are drawn by another seed than those
of the fit.

    python benchmarks/conversion.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from common import count, counts, parser, show, write
from torch import Tensor
from torch.nn.functional import cross_entropy

from yoco_u.architecture import Architecture
from yoco_u.budget import kv_bytes
from yoco_u.conversion import METHODS, Calibration, Source, convert, read_source, target_architecture
from yoco_u.conversion.convert import calibration_rows
from yoco_u.conversion.global_kv import collect
from yoco_u.errors import in_one_line
from yoco_u.formatting import short_bytes
from yoco_u.model import YocoUForCausalLM

CONTEXT = 8192


@torch.no_grad()
def loss(model: YocoUForCausalLM, rows: Tensor) -> float:
    """Nats per token, the mean over rows of tokens, each of which is predicted from those before it."""
    found = [cross_entropy(model(row[None, :-1], use_cache=False).logits[0], row[1:]).item() for row in rows]
    return mean(found)


def figures(name: str, model: YocoUForCausalLM, source: Source, held_out: dict[str, Tensor]) -> dict[str, Any]:
    a, whole = model.model.architecture, kv_bytes(source.model.model.architecture, CONTEXT)
    row: dict[str, Any] = {"model": name} | {f"{text}, nats": loss(model, rows) for text, rows in held_out.items()}
    bytes_ = kv_bytes(a, CONTEXT)
    return row | {"cache at 8K": short_bytes(bytes_), "times smaller": whole / bytes_, "explained": ""}


def main() -> None:
    arguments = parser(__doc__, "conversion")
    arguments.add_argument("source", help="as of yoco-u convert")
    arguments.add_argument("--window", type=count, default=512)
    arguments.add_argument("--global-kvs", type=counts, default="15,5,3,1", help="numbers of global KVs, with commas between")
    arguments.add_argument("--tokens", type=count, default=32_768, help="tokens of the fit")
    arguments.add_argument("--held-out", type=count, default=8, help="rows of each kind of text that are scored")
    arguments.add_argument("--length", type=count, default=1024, help="tokens of a row")
    chosen = arguments.parse_args()

    source = read_source(chosen.source)
    fit = Calibration(tokens=chosen.tokens, length=chosen.length)
    scored = replace(fit, tokens=chosen.held_out * (chosen.length + 1), length=chosen.length + 1, seed=1)
    held_out = {
        "English": calibration_rows(source, replace(scored, corpus=("documentation",))),
        "code": calibration_rows(source, replace(scored, corpus=("packages",))),
    }
    rows = [figures("source", source.model, source, held_out)]
    layers = source.model.model.architecture.stages[0].layers

    def target(**settings: Any) -> Architecture:
        return target_architecture(source.model.model.architecture, {"window": chosen.window} | settings)

    halves = [{"attention": "sliding", "layers": layers // 2}, {"attention": "full", "layers": layers - layers // 2}]
    rows.append(figures("window alone", convert(source, target(stages=halves), "mean").model, source, held_out))
    print(rows, flush=True)
    texts = calibration_rows(source, fit)
    moments = collect(convert(source, target(global_kvs=1), "mean").model, source.model, texts)
    for number in chosen.global_kvs:
        for method in METHODS:
            made = convert(source, target(global_kvs=number), method, moments=moments)
            row = figures(f"{number} global KVs, {method}", made.model, source, held_out)
            rows.append(row | {"explained": f"{mean(made.explained or [0.0]):.0%}"})
            print(rows[-1], flush=True)
    show("Converted, before any training", rows)
    write(chosen.out, {"rows": rows, "fit_tokens": texts.numel(), "window": chosen.window})


if __name__ == "__main__":
    in_one_line(main)
