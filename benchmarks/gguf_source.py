"""How well a GGUF file of 4 bits stands for the model that it was made of, and how exactly it is read here.

Logits: the largest difference between our Transformer and transformers' own load of the file, in float32 and in float64, beside
what float32 itself costs transformers. Quantization: the original weights are not in the file, so the cost of rounding them is
estimated by rounding them once more: each matrix of 4 bits gets an error that is uniform over one step of its grid (Q4_1:
blocks of 32 weights, 15 steps from the smallest to the largest), independent of the first one and of the same size.

    python benchmarks/gguf_source.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import copy
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import count, parser, show, write
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from yoco_u.conversion import Calibration, read_source
from yoco_u.conversion.convert import calibration_rows
from yoco_u.errors import in_one_line
from yoco_u.model import YocoUForCausalLM

BLOCK, STEPS = 32, 15


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits.double()


@torch.no_grad()
def loss(model: YocoUForCausalLM, rows: Tensor) -> float:
    """Nats per token, the mean over rows."""
    return mean(cross_entropy(model(row[None, :-1], use_cache=False).logits[0], row[1:]).item() for row in rows)


@torch.no_grad()
def rounded_once_more(model: YocoUForCausalLM, seed: int) -> YocoUForCausalLM:
    """A copy of the model whose 4-bit matrices, all but the embedding, have one more rounding error."""
    generator = torch.Generator().manual_seed(seed)
    found = copy.deepcopy(model)
    for name, weight in found.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
            blocks = weight.view(-1, BLOCK)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / STEPS
            blocks += step * (torch.rand(blocks.shape, generator=generator) - 0.5)
    return found


def main() -> None:
    arguments = parser(__doc__, "gguf-source")
    arguments.add_argument("source", type=Path, help="a GGUF file in Q4_1")
    arguments.add_argument("--rows", type=count, default=4, help="rows of 1,024 tokens of each kind of text")
    arguments.add_argument("--seeds", type=count, default=3)
    chosen = arguments.parse_args()

    source = read_source(str(chosen.source))
    texts = {
        text: calibration_rows(source, Calibration((entry,), tokens=chosen.rows * 1025, length=1025, seed=1))
        for text, entry in (("English", "documentation"), ("code", "packages"))
    }
    ids = texts["English"][:1, :512]
    file = chosen.source
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    single, own = logits(theirs, ids), logits(source.model, ids)
    exact, own_exact = logits(theirs.double(), ids), logits(copy.deepcopy(source.model).double(), ids)
    differences = {
        "ours and transformers', float32": (own - single).abs().max().item(),
        "ours and transformers', float64": (own_exact - exact).abs().max().item(),
        "transformers' float32 and its float64": (single - exact).abs().max().item(),
        "our float32 and our float64": (own - own_exact).abs().max().item(),
    }
    show("Largest difference of logits", [{"between": name, "difference": value} for name, value in differences.items()])

    before = {text: loss(source.model, rows) for text, rows in texts.items()}
    again = [rounded_once_more(source.model, seed) for seed in range(chosen.seeds)]
    cost = {text: [loss(model, rows) - before[text] for model in again] for text, rows in texts.items()}
    deviation = {text: stdev(found) if len(found) > 1 else None for text, found in cost.items()}
    rows = [
        {"text": text, "nats": before[text], "rounded once more": mean(found), "deviation": deviation[text]}
        for text, found in cost.items()
    ]
    show("Nats per token, and what one more rounding adds", rows)
    write(chosen.out, {"logits": differences, "largest_logit": exact.abs().max().item(), "rounding": rows})


if __name__ == "__main__":
    in_one_line(main)
