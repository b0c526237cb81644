"""How sliding attention grows with the length: time of forward and backward, and peak memory of a whole training step.

    python benchmarks/attention.py

Time: attention of the 100M model's shape, window 512, from 4K to 64K tokens, beside torch's attention with an N x N mask up to
8K. Each round goes through all lengths, and the fastest round counts. Memory: one training step of the quickstart's YOCO-U,
cross-decoder and loss included, in a fresh process for each length; what counts is the peak during the step, less what the
process held before it. A larger model needs more per token.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import count, parser, seconds, show, write
from torch import Tensor

from yoco_u.architecture import preset
from yoco_u.errors import in_one_line
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.model.attention import attend
from yoco_u.model.cpu_attention import block_attention

LENGTHS = [2**power for power in range(12, 17)]
SHAPE = preset("yoco_u", "100m")


def main() -> None:
    arguments = parser(__doc__, "attention")
    arguments.add_argument("--repeats", type=count, default=5)
    arguments.add_argument("--memory-of", type=count, help="run one training step of so many tokens and print its peak memory")
    chosen = arguments.parse_args()
    if chosen.memory_of:
        print(json.dumps(training_step_memory(chosen.memory_of)))
        return

    rounds = [{length: sliding(length) for length in LENGTHS} for _ in range(chosen.repeats)]
    times: list[dict[str, Any]] = []
    for length in LENGTHS:
        row = {"tokens": length, "seconds": min(found[length] for found in rounds)}
        row["growth"] = row["seconds"] / times[-1]["seconds"] if times else "-"
        row["masked N x N seconds"] = masked(length) if length <= 8192 else "-"
        times.append(row)
    show(f"sliding attention, forward and backward, window {SHAPE.window}, bfloat16", times)

    memory: list[dict[str, Any]] = []
    for length in LENGTHS:
        command = [sys.executable, __file__, "--memory-of", str(length)]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["step_bytes"]
        growth = peak / memory[-1]["MiB of the step"] / 2**20 if memory else "-"
        memory.append(
            {"tokens": length, "MiB of the step": peak / 2**20, "growth": growth, "KiB per token": peak / length / 1024}
        )
    show("peak memory of one training step, YOCO-U quickstart, float32 weights, bfloat16 autocast", memory)
    write(chosen.out, {"window": SHAPE.window, "time": times, "memory": memory})


def sliding(length: int) -> float:
    """Seconds of forward and backward of our sliding attention over `length` tokens."""
    q, k, v = heads(length)
    assert SHAPE.window is not None
    window = SHAPE.window
    return min(seconds(lambda: block_attention(q, k, v, window, None, None).sum().backward(), 2))


def masked(length: int) -> float:
    """Seconds of the same by torch's attention, with the window as an N x N mask."""
    q, k, v = heads(length)
    i = torch.arange(length)
    mask = torch.zeros(length, length, dtype=q.dtype)
    mask.masked_fill_((i > i[:, None]) | (i <= i[:, None] - (SHAPE.window or 0)), float("-inf"))
    return min(seconds(lambda: attend(q, k, v, mask[None, None]).sum().backward(), 2))


def heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of the model's shape, each (1, length, heads, head_dim)."""
    counts = (SHAPE.num_attention_heads, SHAPE.num_key_value_heads, SHAPE.num_key_value_heads)
    q, k, v = (torch.randn(1, length, n, SHAPE.head_dim, dtype=torch.bfloat16, requires_grad=True) for n in counts)
    return q, k, v


def training_step_memory(length: int) -> dict[str, int]:
    """Peak resident bytes during a step, less those of the process before it, when it holds the model and its gradients."""
    model = YocoUForCausalLM(YocoUConfig.from_architecture(preset("yoco_u", "quickstart"))).train()
    step(model, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    before = resident("VmRSS")
    step(model, length)
    return {"step_bytes": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Resident bytes of this process, from a field of Linux's process status: VmRSS is the value now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def step(model: YocoUForCausalLM, length: int) -> None:
    tokens = torch.randint(model.config.vocab_size, (1, length))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


if __name__ == "__main__":
    in_one_line(main)
