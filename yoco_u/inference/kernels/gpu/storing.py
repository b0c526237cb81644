"""Writes the keys and values of new tokens to the rows of a cache, which it may quantize to int8."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no bits behind the point, rounding half to even
_TINY = tl.constexpr(1e-30)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _store_token(
    k, v, rows, cache, scales, k_token, k_head, v_token, v_head, cache_rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, 2), keys then values."""
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + token).to(tl.int64)
    if row < 0:
        return
    h, d = tl.arange(0, HEADS_PADDED)[:, None], tl.arange(0, DIM_PADDED)[None, :]
    exists = (h < HEADS) & (d < HEAD_DIM)
    if which == 0:
        x = tl.load(k + token * k_token + h * k_head + d, mask=exists, other=0.0)
    else:
        x = tl.load(v + token * v_token + h * v_head + d, mask=exists, other=0.0)
    place = (which * HEADS + h).to(tl.int64) * cache_rows + row  # (heads, 1), of the cache's rows over keys, values and heads
    if QUANTIZED:
        x = x.to(tl.float32)
        # Bits of positive floats are ordered as the floats are, with NaN as the largest; a maximum of floats would drop NaN.
        bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1, keep_dims=True)
        scale = tl.div_rn(
            tl.maximum(bits, tl.full((), _TINY, tl.float32).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True), 127.0
        )
        x = (tl.div_rn(x, scale) + _ROUND) - _ROUND
        tl.store(scales + place, scale, mask=h < HEADS)
    tl.store(cache + place * HEAD_DIM + d, x.to(cache.dtype.element_ty), mask=exists)


def store_rows(k: Tensor, v: Tensor, rows: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """See `yoco_u.inference.kernels.store_rows`."""
    tokens, heads, head_dim = k.shape
    if tokens == 0:
        return
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    _store_token[tokens, 2](
        k, v, rows, cache, scales, k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.shape[2],
        HEADS=heads, HEAD_DIM=head_dim, HEADS_PADDED=triton.next_power_of_2(heads),
        DIM_PADDED=triton.next_power_of_2(head_dim), QUANTIZED=cache.dtype == torch.int8,
    )  # fmt: skip
