"""RMSNorm with or without a residual, RoPE, and SwiGLU's product: each reads and writes its tensors once."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements of a program; a longer row of RMSNorm is one program's


@triton.jit(do_not_specialize=["rows", "inner"])
def _rms_norm(
    x, residual, weight, out, total, rows, inner, x_outer, x_inner, r_outer, r_inner, eps,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows,). Row r begins at (r // inner) * outer stride + (r % inner) * inner stride."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE_PADDED)[None, :]
    exists = (row < rows) & (column < SIZE)
    values = tl.load(x + row // inner * x_outer + row % inner * x_inner + column, mask=exists, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(residual + row // inner * r_outer + row % inner * r_inner + column, mask=exists, other=0.0)
        rounded = (values + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * SIZE + column, rounded, mask=exists)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / SIZE + eps)
    weights = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, (values * scale * weights).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x, cos, sin, out, tokens, x_batch, x_token, x_head, angle_batch,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * tokens, blocks of a token's pairs)."""
    at = tl.program_id(0).to(tl.int64)
    batch, token = at // tokens, at % tokens
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, d = pair // HALF, pair % HALF
    exists = head < HEADS
    place = x + batch * x_batch + token * x_token + head * x_head + d
    left = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    right = tl.load(place + HALF, mask=exists, other=0.0).to(tl.float32)
    angle = batch * angle_batch + token * (2 * HALF) + d
    result = out + (at * HEADS + head) * (2 * HALF) + d
    turned = left * tl.load(cos + angle, mask=exists, other=0.0) - right * tl.load(sin + angle, mask=exists, other=0.0)
    tl.store(result, turned.to(out.dtype.element_ty), mask=exists)
    angle += HALF
    turned = right * tl.load(cos + angle, mask=exists, other=0.0) + left * tl.load(sin + angle, mask=exists, other=0.0)
    tl.store(result + HALF, turned.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _swiglu(gate_up, out, row_stride, size, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * row_stride + column, mask=column < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=column < size)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    """RMSNorm of x, or of x + residual, into `out`; the sum into `total`."""
    assert weight.shape == x.shape[-1:]
    size, rows = x.shape[-1], x.numel() // max(1, x.shape[-1])
    if rows == 0:
        return
    x = _as_rows(x)
    added = x if residual is None else _as_rows(residual)
    padded = triton.next_power_of_2(size)
    own = max(1, _BLOCK // padded)
    _rms_norm[(triton.cdiv(rows, own),)](
        x, added, weight, out, total, rows, x.shape[1], x.stride(0), x.stride(1), added.stride(0), added.stride(1), eps,
        SIZE=size, SIZE_PADDED=padded, ROWS=own, ADDS=residual is not None, num_warps=4 if padded <= _BLOCK else 8,
    )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """RoPE of x, (batch, tokens, heads, head_dim), into `out`."""
    batch, tokens, heads, head_dim = x.shape
    if x.numel() == 0:
        return
    x, cos, sin = x if x.stride(3) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    pairs = heads * head_dim // 2
    block = min(_BLOCK // 2, triton.next_power_of_2(pairs))
    _rotate[batch * tokens, triton.cdiv(pairs, block)](
        x, cos, sin, out, tokens, *x.stride()[:3], 0 if len(cos) == 1 else cos.stride(0),
        HEADS=heads, HALF=head_dim // 2, BLOCK=block, num_warps=4,
    )  # fmt: skip


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """`silu(gate) * up` of (..., 2 * size) into `out`, (..., size)."""
    if out.numel() == 0:
        return
    x, size = gate_up.reshape(-1, gate_up.shape[-1]), out.shape[-1]
    x = x if x.stride(1) == 1 else x.contiguous()
    block = min(_BLOCK, triton.next_power_of_2(size))
    _swiglu[len(x), triton.cdiv(size, block)](x, out, x.stride(0), size, BLOCK=block, num_warps=4)


def _as_rows(x: Tensor) -> Tensor:
    """(outer, inner, size) with contiguous rows: a view of a part of a joint projection, (1, tokens, heads, size), too."""
    x = x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()
