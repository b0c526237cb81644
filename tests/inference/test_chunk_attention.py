"""Attention of a chunk in the compiled kernel, against the direct formula in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softmax

from yoco_u.inference.kernels.cpu import compiled
from yoco_u.model.cpu_attention import block_attention

needs_kernels = pytest.mark.skipif(not compiled(), reason="needs a C++ compiler")


def inputs(queries: int, keys: int, kv_heads: int, groups: int, head_dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, kv_heads * groups), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(1, *shape, head_dim, generator=generator).bfloat16() for shape in shapes)
    return q, k, v


def direct(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The output in float64, and the same of the values' sizes, which rounding is measured by."""
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    at, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    k, v = (x.double().repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * q.shape[3] ** -0.5
    p = softmax(scores.masked_fill((key > at) | (key <= at - window), -torch.inf), dim=-1)
    out, sizes = (torch.einsum("bhqk,bkhd->bqhd", p, x) for x in (v, v.abs()))
    return out, sizes


def check(q: Tensor, k: Tensor, v: Tensor, window: int) -> None:
    """Weights and the output are rounded to bfloat16 once each, by 2**-8 of themselves at most; all else is float32."""
    found = torch.ops.yoco_u.chunk_attention(q, k, v, window)
    expected, sizes = direct(q, k, v, window)
    assert found.shape == q.shape and found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= 1.01 * 2**-8 * (sizes + expected.abs()) + 1e-5 * sizes).all()


@needs_kernels
@given(
    seed=st.integers(0, 2**16),
    queries=st.integers(1, 130),
    past=st.integers(0, 150),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 7, 100]),
    head_dim=st.sampled_from([2, 16, 40, 64, 80]),
    window=st.integers(1, 300),
)
def test_any_shape(seed: int, queries: int, past: int, kv_heads: int, groups: int, head_dim: int, window: int) -> None:
    check(*inputs(queries, past + queries, kv_heads, groups, head_dim, seed), window)


@needs_kernels
@pytest.mark.parametrize("window", [512, 1000, 3000])
def test_long_chunks(window: int) -> None:
    check(*inputs(700, 2100, 1, 2, 128), window)


@needs_kernels
def test_as_near_as_matrix_products_in_bfloat16() -> None:
    """The way that chunks take without the kernel, which rounds more often."""
    q, k, v = inputs(300, 800, 2, 4, 64)
    exact, _ = direct(q, k, v, 256)
    kernel, products = torch.ops.yoco_u.chunk_attention(q, k, v, 256), block_attention(q, k, v, 256, None, None)
    assert (kernel - exact).abs().mean() <= (products - exact).abs().mean()


@needs_kernels
def test_extreme_scores() -> None:
    q, k, v = inputs(70, 200, 1, 2, 64)
    check(q * 100, k, v, 64)
    check(q * 0, k, v, 64)


@needs_kernels
def test_nan_stays_with_the_tokens_that_see_it() -> None:
    q, k, v = inputs(100, 300, 2, 2, 64)
    clean = torch.ops.yoco_u.chunk_attention(q, k, v, 50)
    q[0, 3, 1] = torch.nan  # token 203
    k[0, 230, 0] = torch.nan  # seen by tokens 230 to 279 in the heads 0 and 1
    found = torch.ops.yoco_u.chunk_attention(q, k, v, 50)
    spoilt = torch.zeros(1, 100, 4, dtype=torch.bool)
    spoilt[0, 3, 1] = True
    spoilt[0, 30:80, :2] = True
    assert found[spoilt].isnan().all()
    assert torch.equal(found[~spoilt], clean[~spoilt])


@needs_kernels
def test_strides_and_threads() -> None:
    q, k, v = (torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in inputs(200, 260, 3, 2, 16))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(q, k, v, 70)
    finally:
        torch.set_num_threads(before)
