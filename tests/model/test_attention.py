"""Sliding attention, in bands and block by block, against a masked N x N attention; chunked against recurrent retention."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import architecture, build, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from yoco_u.model.attention import sliding_attention, sliding_mask
from yoco_u.model.cpu_attention import block_attention, block_attention_backward
from yoco_u.model.retention import CHUNK, chunked_retention, recurrent_retention


def blockwise(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Tensor | None = None) -> Tensor:
    """Sliding attention as CPUs compute it. Segments are those of all keys, (batch, past + queries)."""
    queries = None if segments is None else segments[:, k.shape[1] - q.shape[1] :]
    return block_attention(q, k, v, window, queries, segments)


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Tensor | None = None) -> Tensor:
    """Sliding attention as all other devices compute it."""
    past = k.shape[1] - q.shape[1]
    pair = None if segments is None else (segments[:, past:], segments)
    return sliding_attention(q, k, v, window, sliding_mask(q.shape[1], past, window, pair, q.dtype, q.device))


both_ways = pytest.mark.parametrize("sliding", [blockwise, banded])
Attention = Callable[..., Tensor]


def masked(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Tensor | None = None) -> Tensor:
    """Sliding attention by its definition: the scores of all pairs, most of them masked, in the dtype of the inputs."""
    queries, keys = q.shape[1], k.shape[1]
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    i = torch.arange(keys - queries, keys)[:, None]
    j = torch.arange(keys)[None]
    allowed = ((i - j >= 0) & (i - j < window))[None, None]
    if segments is not None:
        allowed = allowed & (segments[:, None, keys - queries :, None] == segments[:, None, None, :])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def draw_qkv(seed: int, queries: int, past: int, kv_heads: int, groups: int, head_dim: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, kv_heads * groups), (past + queries, kv_heads), (past + queries, kv_heads)]
    make: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(batch, n, heads, head_dim, **make).requires_grad_() for n, heads in shapes]


def draw_segments(data: st.DataObject, length: int) -> Tensor | None:
    """Segments of two rows: none, padding on the left or the right, or documents, with or without padding after them."""
    kind = data.draw(st.sampled_from(["none", "left", "right", "documents", "documents and padding"]))
    if kind == "none":
        return None
    segments = torch.ones(2, length, dtype=torch.long)
    if "documents" in kind:
        for row in range(2):
            for start in data.draw(st.lists(st.integers(0, length - 1), max_size=4)):
                segments[row, start:] += 1
    if kind != "documents":
        padding = data.draw(st.integers(0, length))
        row = slice(0, padding) if kind == "left" else slice(length - padding, length)
        segments[1, row] = 0
    return segments


@both_ways
@settings(max_examples=examples(50))
@given(
    st.data(),
    st.integers(1, 150),
    st.integers(1, 70),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([2, 8]),
)
def test_sliding_attention_equals_the_masked_square(
    sliding: Attention, data: st.DataObject, queries: int, window: int, kv_heads: int, groups: int, head_dim: int
) -> None:
    past = data.draw(st.integers(0, window - 1), "past")
    q, k, v = draw_qkv(queries, queries, past, kv_heads, groups, head_dim)
    segments = draw_segments(data, past + queries)
    actual, expected = sliding(q, k, v, window, segments), masked(q, k, v, window, segments)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    direction = torch.randn(expected.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (q, k, v), direction), torch.autograd.grad(expected, (q, k, v), direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("queries", "window"), [(700, 256), (1100, 300), (513, 512), (770, 512)])
def test_wide_windows_whose_blocks_are_half_a_window(queries: int, window: int) -> None:
    for past in (0, 1, window - 1):
        q, k, v = draw_qkv(0, queries, past, 1, 2, 4)
        segments = torch.ones(2, past + queries, dtype=torch.long)
        segments[0, 400:] = 2
        segments[1, :37] = 0
        for chosen in (None, segments):
            expected = masked(q, k, v, window, chosen)
            for sliding in (blockwise, banded):
                torch.testing.assert_close(sliding(q, k, v, window, chosen), expected, rtol=1e-10, atol=1e-10)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(sliding: Attention, dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in draw_qkv(0, 200, 0, 2, 2, 16))
    actual = sliding(q, k, v, 20)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = masked(q.double(), k.double(), v.double(), 20)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@both_ways
@pytest.mark.parametrize("queries", [40, 200])
@pytest.mark.parametrize("window", [1, 2, 5, 32, 33])
def test_the_window_is_exactly_w_keys(sliding: Attention, queries: int, window: int) -> None:
    q, k, v = (x.detach() for x in draw_qkv(0, queries, 0, 1, 1, 4, batch=1))
    before = sliding(q, k, v, window)
    for i in (window, queries - 1):
        if i >= queries:
            continue
        for key, changes in ((i - window, False), (i - window + 1, True), (i, True), (i + 1, False)):
            if not 0 <= key < queries:
                continue
            moved = v.clone()
            moved[:, key] += 1
            assert (not torch.equal(sliding(q, k, moved, window)[:, i], before[:, i])) == changes, (i, key)


def test_reach_of_a_stack_is_layers_times_the_window_less_one() -> None:
    """Through the model: with M sliding layers and T loops a token reaches back exactly M T (W - 1) positions."""
    arch = architecture("yoco_u", layers=4, loops=2, window=4)
    model = build(arch).double().model
    reach, n = 2 * 2 * 3, 30
    x = torch.randn(1, n, arch.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        for key, changes in ((n - 2 - reach, False), (n - 1 - reach, True)):
            moved = x.clone()
            moved[:, key] += 1
            outs = []
            for inputs in (x, moved):
                seen: list[Tensor] = []
                hook = model.global_kv.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                model(inputs_embeds=inputs)
                hook.remove()
                outs.append(seen[0][:, -1])
            assert (not torch.equal(*outs)) == changes


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    elements = 0
    ours = {op._qualname: op._init_fn for op in (block_attention, block_attention_backward)}  # run by hand, to see inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.ours:
            with self:
                out = self.ours[func._schema.name](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.usefixtures("attention_path")
@pytest.mark.parametrize("packed", [False, True])
def test_no_square_is_ever_made_for_a_sliding_layer(packed: bool) -> None:
    """Forward and backward through sliding stages: the largest tensor grows with N, not with its square."""
    arch = architecture("yoco_u", window=16)
    arch = arch.model_copy(update={"stages": arch.stages[:1], "vocab_size": 8, "intermediate_size": 16})
    model = build(arch).train()
    largest = []
    for n in (1024, 2048):
        ids = tokens(1, n, 8)
        documents = (torch.arange(n) // 100)[None] if packed else None
        with LargestTensor() as recorded:
            model(ids, labels=ids, document_ids=documents, use_cache=False).loss.backward()
        assert recorded.elements < n * n / 4
        largest.append(recorded.elements)
    assert largest[1] <= 2.1 * largest[0]


def test_the_operators_are_well_formed() -> None:
    """Schema, shapes without data, autograd registration: what torch.compile and checkpointing rely on."""
    q, k, v = (x.float().detach().requires_grad_() for x in draw_qkv(0, 70, 3, 2, 2, 4))
    segments = torch.ones(2, 73, dtype=torch.long)
    for part in (None, segments):
        torch.library.opcheck(block_attention, (q, k, v, 4, part if part is None else part[:, 3:], part))


# Gated retention


def draw_retention(seed: int, n: int, heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, heads, 4, generator=generator, dtype=dtype) for _ in range(3))
    log_decay = -(torch.rand(2, n, heads, generator=generator, dtype=dtype) ** 3) * 3
    state = torch.randn(2, heads, 4, 4, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, log_decay, state)]


@given(
    st.one_of(st.integers(1, 20), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])),
    st.integers(1, 3),
)
def test_chunked_retention_equals_recurrent(n: int, heads: int) -> None:
    inputs = draw_retention(n, n, heads)
    ours, theirs = chunked_retention(*inputs), recurrent_retention(*inputs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(sum((x**2).sum() for x in outs), inputs) for outs in (ours, theirs)]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@given(st.data(), st.sampled_from([10, CHUNK + 1, 3 * CHUNK]))
def test_retention_forgets_at_a_document(data: st.DataObject, n: int) -> None:
    starts = sorted({0, *data.draw(st.lists(st.integers(0, n - 1), max_size=4)), min(n - 1, CHUNK)})
    inputs = draw_retention(n, n, 2)
    inputs[-1] = torch.zeros_like(inputs[-1])
    documents = torch.zeros(2, n, dtype=torch.long)
    for start in starts[1:]:
        documents[:, start:] += 1
    actual, state = chunked_retention(*inputs, documents)
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        expected, last = recurrent_retention(*(x[:, start:end] for x in inputs[:4]), inputs[-1])
        torch.testing.assert_close(actual[:, start:end], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


def test_retention_of_a_fast_decay_is_finite() -> None:
    """Decays that underflow within a chunk must not turn into inf - inf, forward or backward."""
    q, k, v, log_decay, state = draw_retention(0, 2 * CHUNK, 1, torch.float32)
    log_decay = torch.full_like(log_decay, -50.0).requires_grad_()
    outs = chunked_retention(q, k, v, log_decay, state)
    for actual, expected in zip(outs, recurrent_retention(q, k, v, log_decay, state), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(sum(x.sum() for x in outs), (q, k, v, log_decay, state)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retention_model_decodes_as_it_trains(dtype: torch.dtype) -> None:
    """Chunked over a whole text against one token at a time, in the precision of the model."""
    model = build(architecture("yoco_retention")).to(dtype)
    ids = tokens(2, CHUNK + 10)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    with torch.no_grad():
        expected = model(ids).logits
        cache, steps = None, []
        for n in range(ids.shape[1]):
            out = model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    difference = (torch.cat(steps, 1) - expected).float().abs()
    assert float(difference.mean()) < tolerance / 5
    assert float(difference.max()) < tolerance * 3
