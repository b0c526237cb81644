"""The Triton kernels in Triton's interpreter, against formulas in float64; `test_gpu_kernels.py` runs these tests.

They have a process of their own, since `TRITON_INTERPRET=1` holds for all kernels of a process.
"""

import math

import pytest
import torch
import triton_interpreter  # noqa: F401  before the first kernel
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CACHES, DTYPES, Case, assert_rounded, paged, random, seeds, split_keys
from torch import Tensor

from yoco_u.inference.kernels import direct, gpu
from yoco_u.inference.kernels.gpu.splits import SplitPlan, plan_splits
from yoco_u.model.rope import rotary_angles


def check_attention(case: Case, plan: SplitPlan, sequences: int | None = None) -> None:
    """Of the first sequences of a case. In bfloat16, weights and the output are rounded once each, by 2**-8 at most."""
    q = case.q[:sequences]
    out, lse = gpu.decode_attention(q, case.cache, case.scales, case.table[:sequences], case.block_size, plan)
    exact, sizes, exact_lse = (x[:sequences] for x in case.truth())
    assert_rounded(lse, exact_lse, 5e-6)
    assert out.dtype == q.dtype
    if q.dtype == torch.float32 or case.cache.dtype == torch.float32:
        assert_rounded(out, exact)
    else:
        bound = 1.01 * 2**-8 * (sizes + exact.abs()) + 1e-5 * sizes
        assert bool(((out.double() - exact).abs() <= bound).logical_or(exact.isnan() & out.isnan()).all())


def split(lengths: Tensor, capacity: int, tile: int = 128) -> SplitPlan:
    arrays = plan_splits(lengths.numpy(), capacity, tile)
    return SplitPlan(**{name: torch.from_numpy(array) for name, array in arrays.items()})


@settings(max_examples=examples(10))
@given(
    case=st.builds(
        paged,
        seeds,
        st.sampled_from(DTYPES),
        st.sampled_from(CACHES),
        st.sampled_from([8, 16, 40, 64, 128]),
        st.integers(1, 8),
        st.integers(1, 2),
        st.lists(st.one_of(st.integers(0, 40), st.integers(0, 500)), min_size=1, max_size=3),
        st.sampled_from([1, 5, 16, 128, 512]),
    ),
    spare=st.integers(0, 6),
    dropped=st.integers(0, 1),
)
def test_decode_attention(case: Case, spare: int, dropped: int) -> None:
    """In parts, with items of sequences that have no query any more."""
    sequences = max(1, len(case.q) - dropped)
    check_attention(case, split(case.lengths, len(case.q) + spare), sequences)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CACHES)
def test_decode_attention_of_rings(kind: torch.dtype, dtype: torch.dtype) -> None:
    """One block of any size for each sequence, an empty one among them, and nothing to join."""
    for window in (1, 7, 130):
        case = paged(window, dtype, kind, 32, 5, 2, [window, 0, (window + 1) // 2], window)
        check_attention(case, SplitPlan.undivided(case.lengths))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, torch.float32), *((torch.bfloat16, kind) for kind in CACHES)])
def test_decode_attention_of_long_sequences(kind: torch.dtype, dtype: torch.dtype) -> None:
    case = paged(3, dtype, kind, 16, 5, 1, [2100, 0, 1, 1000], 256)
    check_attention(case, split(case.lengths, 20))


@pytest.mark.parametrize("kind", CACHES)
def test_decode_attention_keeps_nan_where_it_is(kind: torch.dtype) -> None:
    for which in (0, 1):
        case = paged(which, torch.bfloat16, kind, 16, 3, 2, [300, 40], 16)
        row = case.rows(0)[150]
        if case.scales is None:
            case.cache[which, 1, row] = torch.nan
        else:
            case.scales[which, 1, row] = torch.nan
        out, _ = gpu.decode_attention(case.q, case.cache, case.scales, case.table, 16, split(case.lengths, 6))
        assert bool(out[0, 3:].isnan().all())
        assert int(out.isnan().sum()) == out[0, 3:].numel()


@settings(max_examples=examples(10))
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(CACHES),
    head_dim=st.sampled_from([8, 40, 64]),
    heads=st.integers(1, 4),
    tokens=st.integers(0, 12),
    special=st.sampled_from([None, None, torch.nan, torch.inf]),
)
def test_store_rows(
    seed: int, dtype: torch.dtype, kind: torch.dtype, head_dim: int, heads: int, tokens: int, special: float | None
) -> None:
    """Bit for bit what the direct way stores, and nothing else is touched; row -1 stands for nowhere."""
    generator = torch.Generator().manual_seed(seed)
    k, v = split_keys(generator, tokens, heads, head_dim, dtype)
    k[:1, 0] = 0
    k[1:2, 0] = torch.arange(head_dim) - 2.5  # halves, which round to even, where the scale is 1
    k[1:2, 0, 0] = 127
    if special is not None:
        v[-1:, -1, 5] = special
    rows = torch.randperm(30, generator=generator)[:tokens]
    rows[torch.rand(tokens, generator=generator) < 0.2] = -1
    caches = [torch.full((2, heads, 30, head_dim), 3).to(kind) for _ in range(2)]
    scales = [torch.full((2, heads, 30), 5.0) if kind == torch.int8 else None for _ in range(2)]
    gpu.store_rows(k, v, rows, caches[0], scales[0])
    direct.store_rows(k, v, rows, caches[1], scales[1])
    if scales[0] is not None and scales[1] is not None:
        torch.testing.assert_close(scales[0], scales[1], rtol=0, atol=0, equal_nan=True)
        finite = scales[0].isfinite()
        caches = [cache[finite] for cache in caches]
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=examples(8))
@given(seed=seeds, tokens=st.integers(0, 3), heads=st.integers(1, 3), head_dim=st.sampled_from([2, 16, 40, 64]))
def test_retention_step(seed: int, tokens: int, heads: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = random(generator, tokens, 3 * heads, head_dim).chunk(3, dim=1)
    log_decay, states = -torch.rand(tokens, heads, generator=generator), random(generator, 5, heads, head_dim, head_dim)
    seats = torch.randperm(5, generator=generator)[:tokens].int()
    seats[1:2] = -1
    exact_states = states.double()
    exact = direct.retention_step(*(x.double() for x in (q, k, v, log_decay)), exact_states, seats)
    assert_rounded(gpu.retention_step(q, k, v, log_decay, states, seats), exact, 1e-5)
    assert_rounded(states, exact_states)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


@settings(max_examples=examples(10))
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1, 5, 64, 100, 2560]),
    tokens=st.integers(0, 5),
    magnitude=st.sampled_from([1.0, 1e-12, 1e12]),
)
def test_rms_norm(seed: int, dtype: torch.dtype, size: int, tokens: int, magnitude: float) -> None:
    """Of a part of a joint projection, and of a sum."""
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, 1, tokens, 5, size, dtype=dtype)[:, :, :3] * magnitude
    residual, weight = random(generator, 1, tokens, 3, size, dtype=dtype) * magnitude, random(generator, size, dtype=dtype)
    assert_rounded(gpu.rms_norm(x, weight, 1e-6), exact_norm(x, weight))
    normed, total = gpu.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert_rounded(normed, exact_norm(x + residual, weight))


@settings(max_examples=examples(10))
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    head_dim=st.sampled_from([2, 16, 40, 128]),
    heads=st.sampled_from([1, 3, 20]),
    batch=st.integers(1, 2),
    tokens=st.integers(0, 3),
    own_angles=st.booleans(),
)
def test_rotate(seed: int, dtype: torch.dtype, head_dim: int, heads: int, batch: int, tokens: int, own_angles: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, batch, tokens, 2 * heads + 1, head_dim, dtype=dtype)[:, :, heads:-1]
    positions = torch.randint(100_000, (batch if own_angles else 1, tokens), generator=generator)
    angles = rotary_angles(positions, head_dim, 10_000.0)
    cos, sin = (angle.double() for angle in angles)
    left, right = x.double().chunk(2, dim=-1)
    assert_rounded(gpu.rotate(x, *angles), x.double() * cos + torch.cat([-right, left], dim=-1) * sin)


@settings(max_examples=examples(15))
@given(seed=seeds, dtype=st.sampled_from(DTYPES), size=st.sampled_from([1, 7, 256, 3000]), rows=st.integers(0, 3))
def test_swiglu(seed: int, dtype: torch.dtype, size: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, rows, 1, 2 * size, dtype=dtype) * 3
    x[:1, 0, 0] = 88.0  # of the gate: large, far below all exponents, and no number
    x[1:2, 0, 0] = -1e4
    x[2:, 0, 0] = math.nan
    gate, up = x.double().chunk(2, dim=-1)
    assert_rounded(gpu.swiglu(x), gate * gate.sigmoid() * up)


def test_operators_are_opaque_to_the_compiler() -> None:
    """A compiled function calls them as they are, and sees what they write."""
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    k, rows, cache = torch.randn(3, 1, 8), torch.tensor([2, -1, 0]), torch.zeros(2, 1, 4, 8)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = gpu.add_rms_norm(x, residual, weight, 1e-6)
        gpu.store_rows(k, k, rows, cache, None)
        return gpu.swiglu(normed) * 2, total

    found = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(cache[0, 0, 2], k[0, 0])
    for one, other in zip(found, step(x), strict=True):
        assert torch.equal(one, other)
