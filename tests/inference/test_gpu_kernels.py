"""What surrounds the Triton kernels: plans of splits, merging, shapes without a device; and their tests in the interpreter."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import pass_in_the_interpreter

from yoco_u.inference import kernels
from yoco_u.inference.kernels import gpu
from yoco_u.inference.kernels.gpu.splits import TILE, SplitPlan, merge_attention, plan_splits, split_capacity


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_and_the_engine_on_them_in_the_interpreter() -> None:
    pass_in_the_interpreter("interpreted_kernels.py", "interpreted_engine.py")


@settings(max_examples=300)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.integers(0, 300_000)), min_size=0, max_size=40),
    spare=st.integers(0, 300),
    tile=st.sampled_from([16, 64, 256]),
)
def test_plan_splits(lengths: list[int], spare: int, tile: int) -> None:
    """Every key in exactly one item of its sequence, items of one size in order, and no smaller size that would do."""
    keys = np.array(lengths, dtype=np.int32)
    capacity = int((keys > 0).sum()) + spare
    plan = plan_splits(keys, capacity, tile)
    sequence, first, last, offsets = (plan[name].tolist() for name in ("sequence", "first", "last", "offsets"))
    assert len(sequence) == len(first) == len(last) == capacity
    assert all(array.dtype == np.int32 for array in plan.values())
    assert offsets[0] == 0 and len(offsets) == len(lengths) + 1
    sizes = []
    for i, length in enumerate(lengths):
        at = 0
        for item in range(offsets[i], offsets[i + 1]):
            assert sequence[item] == i and first[item] == at < last[item] and at % tile == 0
            sizes.append(last[item] - at)
            at = last[item]
        assert at == length
    assert first[offsets[-1] :] == last[offsets[-1] :]

    largest = max(sizes, default=0)
    size = -(-largest // tile) * tile
    if size > tile:
        assert sum(-(-length // (size - tile)) for length in lengths) > capacity
    for i, length in enumerate(lengths):
        assert offsets[i + 1] - offsets[i] <= -(-length // size) if size else True


def test_plan_splits_without_room() -> None:
    with pytest.raises(ValueError, match="3 sequences need as many work items, but the plan has room for 2"):
        plan_splits(np.array([5, 0, 1, 1]), 2)


def test_the_capacity_is_enough_for_any_batch() -> None:
    """One long sequence among many short ones is divided as if it were alone."""
    capacity = split_capacity(64, 4, torch.device("cpu"))
    lengths = np.ones(64, dtype=np.int64)
    lengths[7] = 100 * TILE
    sizes = plan_splits(lengths, capacity)
    assert int((sizes["sequence"] == 7).sum()) >= capacity - 64


@given(
    seed=st.integers(0, 10**6),
    seen=st.integers(0, 5),
    others=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_merge_attention(seed: int, seen: int, others: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, seen + others, generator=generator) * 5
    values = torch.randn(seen + others, 4, generator=generator).to(dtype)
    out = [
        (part.softmax(-1) @ own.float()).to(dtype)
        for part, own in zip(scores.split([seen, others], -1), values.split([seen, others]), strict=True)
    ]
    lse = [part.logsumexp(-1) for part in scores.split([seen, others], -1)]
    found = merge_attention(out[0], lse[0], out[1], lse[1])
    assert found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7 * float(values.abs().max() if values.numel() else 0)
    torch.testing.assert_close(found.float(), scores.softmax(-1) @ values.float(), rtol=0, atol=tolerance)


def test_shapes_without_a_device() -> None:
    """On the meta device every kernel gives its shapes, whatever is installed."""
    q, cache = torch.empty(3, 8, 16, device="meta", dtype=torch.bfloat16), torch.empty(2, 2, 64, 16, device="meta")
    table, lengths = torch.empty(3, 4, dtype=torch.int32, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    joined = SplitPlan(*(torch.empty(n, dtype=torch.int32, device="meta") for n in (9, 9, 9, 4)))
    prefix = torch.empty(5, 2, 16, device="meta"), torch.empty(5, 2, 16, device="meta")
    kernels.store_rows(q[:, :2], q[:, 2:4], lengths, cache, None)
    for found in (
        kernels.decode_attention(q, cache, None, table, 16, lengths),
        kernels.decode_attention(q, cache, None, table, 16, lengths, joined, prefix),
        kernels.rotate(q[None], (torch.empty(1, 3, 1, 16, device="meta"),) * 2)[0],
        gpu.rms_norm(q, q[0, 0], 1e-6),
        *gpu.add_rms_norm(q, q, q[0, 0], 1e-6),
    ):
        assert found.shape == q.shape and found.dtype == q.dtype
    states = torch.empty(6, 8, 16, 16, device="meta")
    assert kernels.retention_step(q.float(), q.float(), q.float(), q[..., 0].float(), states, lengths).shape == q.shape
    assert gpu.swiglu(q).shape == (3, 8, 8)
