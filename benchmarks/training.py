"""Training speed: model FLOP/s of whole optimizer steps, beside the rate of matrix products (GEMM) and transformers' Llama.

    python benchmarks/training.py

A step is forward, backward, clipping and fused AdamW under bfloat16 autocast with float32 weights, at length 2048; in float32
alone on a CPU that does not multiply bfloat16. The Llama has the shape, dtype and optimizer of our `transformer` preset; it
runs as transformers runs it (eager, SDPA), and under torch.compile. The model FLOPs of all come from `yoco_u.budget`, where a
window counts as W keys and causal attention as half: a model that computes what it then masks away gets no credit for it. Each
round runs all models in turn and measures the GEMM rate, so that noise of the machine meets all alike.
"""

import statistics
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

import torch
from common import count, parser, seconds, show, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from yoco_u import Architecture, YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import SIZES, preset
from yoco_u.budget import parameters, training_flops
from yoco_u.device import gemm_rate, multiplies_bfloat16
from yoco_u.errors import in_one_line
from yoco_u.training.parallelize import compile_model

LENGTH = 2048
CPU = torch.device("cpu")
DTYPE = torch.bfloat16 if multiplies_bfloat16(CPU) else torch.float32


def main() -> None:
    arguments = parser(__doc__, "training")
    arguments.add_argument("--rounds", type=count, default=4)
    arguments.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["100m", "8m"])
    arguments.add_argument("--tokens", type=whole_rows, default=2 * LENGTH, help=f"per step, a multiple of {LENGTH}")
    chosen = arguments.parse_args()

    rows = [row for size in chosen.sizes for row in measure(size, chosen.rounds, chosen.tokens // LENGTH)]
    show(f"training at length {LENGTH}, {DTYPE}, {chosen.tokens} tokens per step", rows)
    write(chosen.out, {"length": LENGTH, "dtype": str(DTYPE), "tokens_per_step": chosen.tokens, "rows": rows})


def whole_rows(text: str) -> int:
    """An option that is the tokens of a step."""
    if (tokens := count(text)) % LENGTH:
        raise ArgumentTypeError(f"is {tokens}; expected a multiple of {LENGTH}, the tokens of a row")
    return tokens


def measure(size: str, rounds: int, batch_rows: int) -> list[dict[str, Any]]:
    """One row per model of a size, with medians of the rounds."""
    shape = {"100m": "about 100M parameters", "8m": "hidden size 256"}.get(size, size)
    transformer = preset("transformer", size)
    candidates: dict[str, tuple[Architecture, Callable[[], None]]] = {}
    for name in ("yoco_u", "yoco", "transformer"):
        architecture = preset(name, size)
        model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture))
        compile_model(model, "on", model.device)
        candidates[f"yoco-u {name}"] = (architecture, step(model, architecture, batch_rows, LENGTH, use_cache=False))
    for name, compiled in (("Llama (transformers)", False), ("Llama (transformers), compiled", True)):
        llama: Any = LlamaForCausalLM(llama_config(transformer))
        if compiled:
            llama.compile(dynamic=False)
        candidates[name] = (transformer, step(llama, transformer, batch_rows, LENGTH))

    found: dict[str, list[float]] = {name: [] for name in candidates}
    rates = [gemm_rate(CPU, DTYPE)]
    for _ in range(rounds):
        for name, (architecture, call) in candidates.items():
            best = min(seconds(call, 2))
            found[name].append(training_flops(architecture, LENGTH) * batch_rows * LENGTH / best)
        rates.append(gemm_rate(CPU, DTYPE))
    gemm, llama_speed = statistics.median(rates), statistics.median(found["Llama (transformers)"])
    return [
        {
            "model": name,
            "shape": shape,
            "parameters": parameters(architecture).total,
            "tokens/s": statistics.median(found[name]) / training_flops(architecture, LENGTH),
            "model GFLOP/s": statistics.median(found[name]) / 1e9,
            "GEMM GFLOP/s": gemm / 1e9,
            "of GEMM": statistics.median(found[name]) / gemm,
            "against Llama": statistics.median(found[name]) / llama_speed,
        }
        for name, (architecture, _) in candidates.items()
    ]


def llama_config(a: Architecture) -> LlamaConfig:
    """The Llama of the same shape as an architecture of full attention without loops."""
    return LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
        num_hidden_layers=a.unrolled_layers, num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_key_value_heads, head_dim=a.head_dim, tie_word_embeddings=a.tie_word_embeddings,
        max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip


def step(model: nn.Module, architecture: Architecture, batch_rows: int, length: int, **kwargs: Any) -> Callable[[], None]:
    """A function that runs one optimizer step, on the same random rows each time."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens: Tensor = torch.randint(architecture.vocab_size, (batch_rows, length), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.bfloat16 == DTYPE):
            loss = model(input_ids=tokens, labels=tokens, **kwargs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return call


if __name__ == "__main__":
    in_one_line(main)
