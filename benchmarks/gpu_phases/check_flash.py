"""torch's variable-length flash attention as the models call it, against attention with a mask of all pairs of tokens.

Grouped heads are what versions of torch differ in, so they are checked forward and backward.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_phases.check import largest_error, verdict
from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.model.gpu_attention import find_sequences

BFLOAT16 = 4e-2
"""The largest error, as a share of the largest entry of the truth: gradients of grouped heads are summed in bfloat16."""

Shape = tuple[int, int, int]  # heads, kv heads, head_dim


def check_flash(record: Record, scale: Scale) -> None:
    device = torch.device(scale.device)
    if device.type != "cuda":  # a CPU has none
        return
    for shape in scale.attention_shapes:
        for window in (None, 64):
            what = "full" if window is None else f"window {window}"
            name = f"flash attention, {shape[0]} heads of {shape[2]}, {shape[1]} kv, {what}"
            record.measure(name, partial(attention, device, shape, scale.attention_lengths, window))


def attention(device: torch.device, shape: Shape, lengths: tuple[int, ...], window: int | None) -> Figure:
    """Variable-length attention with grouped heads, forward and backward, over one row of sequences of these lengths."""
    heads, kv_heads, head_dim = shape
    draw, tokens = torch.Generator().manual_seed(2), sum(lengths)
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    inputs = {n: torch.randn(1, tokens, count, head_dim, generator=draw).to(torch.bfloat16) for n, count in sizes.items()}
    weights = torch.randn(1, tokens, heads, head_dim, generator=draw)
    cumulative = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    sequences = find_sequences(cumulative, 1, tokens, None, 0)
    there = {name: x.to(device, copy=True).requires_grad_() for name, x in inputs.items()}
    found = {"output": sequences.attend(there["q"], there["k"], there["v"], window)}
    (found["output"].float() * weights.to(device)).sum().backward()
    here = {name: x.float().requires_grad_() for name, x in inputs.items()}
    parts = zip(*(x.split(list(lengths), dim=1) for x in here.values()), strict=True)
    truth = {"output": torch.cat([direct_attention(q, k, v, window) for q, k, v in parts], dim=1)}
    (truth["output"] * weights).sum().backward()
    for name in sizes:
        for gradients, tensors in ((found, there), (truth, here)):
            gradient = tensors[name].grad
            assert gradient is not None
            gradients[f"gradient of {name}"] = gradient
    errors = {name: largest_error(found[name], truth[name].detach()) for name in truth}
    worst = max(errors, key=lambda name: errors[name])
    return verdict(errors[worst], BFLOAT16, where=worst)


def direct_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention within one sequence, each (1, tokens, heads, head_dim), with a mask of all pairs."""
    tokens, groups = q.shape[1], q.shape[2] // k.shape[2]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    allowed = (j <= i) & (j > i - (window or tokens))
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
