"""The Triton kernels for GPUs, registered as `torch.ops.yoco_u_gpu`.

Call them through `yoco_u.inference.kernels`, or through the functions below where there is no implementation for CPUs. Every
operator writes into tensors that these functions allocate, so under torch.compile and on the meta device it does nothing.
Triton itself is imported when the first kernel is launched. Start reading at `attention.py`, whose kernels are the ones
that decide how fast decoding is; the other files hold what an engine step does besides attention and matrix products.

Triton compiles a kernel again for each kind of number it is given (1, a multiple of 16, any other) and each alignment of a
pointer, unless told not to. So it is told of all that changes from step to step: batches of all sizes run the same kernels.

With `TRITON_INTERPRET=1` in the environment the operators take CPU tensors: Triton's interpreter then runs the same kernels.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from yoco_u.device import what_triton_lacks
from yoco_u.errors import UserError
from yoco_u.inference.kernels.gpu.splits import SplitPlan

_LIBRARY = torch.library.Library("yoco_u_gpu", "DEF")


def store_rows(k: Tensor, v: Tensor, rows: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """See `yoco_u.inference.kernels.store_rows`."""
    torch.ops.yoco_u_gpu.store_rows(k, v, rows, cache, scales)


def decode_attention(
    q: Tensor, cache: Tensor, scales: Tensor | None, block_table: Tensor, block_size: int, plan: SplitPlan
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence, as `yoco_u.inference.kernels.decode_attention` defines it, over the keys of a plan.

    Returns:
        The output, (sequences, heads, head_dim) in the dtype of q, zeros for a sequence without keys; and the log-sum-exp of
        each query's scores, (sequences, heads) float32, -inf for a sequence without keys.
    """
    sequences, heads, head_dim = q.shape
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), _float32(q, sequences, heads)
    items = len(plan.sequence)
    parts = None if plan.single else (_float32(q, items, heads, head_dim), _float32(q, items, heads))
    part_out, part_lse = (out, lse) if parts is None else parts
    reads = (q, cache, scales, block_table, block_size, plan.sequence, plan.first, plan.last)
    torch.ops.yoco_u_gpu.attend_items(*reads, part_out, part_lse, plan.single)
    if not plan.single:
        torch.ops.yoco_u_gpu.join_items(part_out, part_lse, plan.offsets, out, lse)
    return out, lse


def retention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, seats: Tensor) -> Tensor:
    """See `yoco_u.inference.kernels.retention_step`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    torch.ops.yoco_u_gpu.retention_step(q, k, v, log_decay, states, seats, out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension: x (..., size), weight (size,); computed in float32, returned in the dtype of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.yoco_u_gpu.rms_norm(x, None, weight, eps, out, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + residual`, both (..., size) of one dtype, and RMSNorm of this sum as it is rounded to that dtype.

    Returns:
        The normed sum and the sum.
    """
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    torch.ops.yoco_u_gpu.rms_norm(x, residual, weight, eps, normed, total)
    return normed, total


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, as `yoco_u.model.rope.rotate` defines it.

    Args:
        x: (batch, tokens, heads, head_dim).
        cos, sin: (batch or 1, tokens, 1, head_dim), float32.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.yoco_u_gpu.rotate(x, cos, sin, out)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of gate and up side by side, (..., 2 * size) -> (..., size); computed in float32."""
    out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    torch.ops.yoco_u_gpu.swiglu(gate_up, out)
    return out


def start_triton() -> None:
    """Let Triton build what launches its kernels, now and not while a request waits.

    Raises:
        UserError: if Triton is not installed, or cannot do that here.
    """
    if (lack := what_triton_lacks()) is not None:
        raise UserError(f"the engine's kernels for GPUs are written in Triton: {lack}")


@cache
def _launcher(module: str, name: str) -> Callable[..., None]:
    return getattr(import_module(f"{__name__}.{module}"), name)


def _register(schema: str, module: str) -> None:
    """Make an operator of a function of one of the modules beside this one."""
    name = schema.partition("(")[0]

    def launch(*arguments: Any) -> None:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, whatever the tensors'
            _launcher(module, name)(*arguments)

    def fake(*arguments: Any) -> None:
        """The outputs were allocated by the caller."""

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _LIBRARY.impl(name, launch, "CPU")
    torch.library.register_fake(f"yoco_u_gpu::{name}", fake, lib=_LIBRARY)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


_register("store_rows(Tensor k, Tensor v, Tensor rows, Tensor(a!) cache, Tensor(b!)? scales) -> ()", "storing")
_register(
    "attend_items(Tensor q, Tensor cache, Tensor? scales, Tensor block_table, int block_size, Tensor sequence, Tensor first, "
    "Tensor last, Tensor(a!) out, Tensor(b!) lse, bool single) -> ()",
    "attention",
)
_register("join_items(Tensor part_out, Tensor part_lse, Tensor offsets, Tensor(a!) out, Tensor(b!) lse) -> ()", "attention")
_register(
    "retention_step(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) states, Tensor seats, Tensor(b!) out) -> ()",
    "retention",
)
_register(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) out, Tensor(b!)? total) -> ()", "pointwise"
)
_register("rotate(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> ()", "pointwise")
_register("swiglu(Tensor gate_up, Tensor(a!) out) -> ()", "pointwise")
