"""Attention by torch's fused kernels: full, cross, and sliding in bands. There are no parameters and no caches here.

Tensors are laid out (batch, tokens, heads, head_dim). Masks are additive, 0 or -inf, in the dtype of the queries. Where a mask
is None, attention is plainly causal, or the queries see all keys.

Segments are integers, one per token, (batch, tokens): a token sees only tokens of its own segment. Segment 0 is padding, which
sees only padding, so that no row of a softmax is ever empty; documents are numbered from 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_mask(query_positions: Tensor, keys: int, segments: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """The causal mask of some queries against all keys.

    Args:
        query_positions: index of each query among the keys, (queries,).
        keys: how many keys there are.
        segments: segments of the queries, (batch, queries), and of the keys, (batch, keys); None for one segment.
        dtype: dtype of the queries.

    Returns:
        (batch or 1, 1, queries, keys)
    """
    key_positions = torch.arange(keys, device=query_positions.device)
    allowed = key_positions <= query_positions[:, None]  # (queries, keys)
    if segments is not None:
        queries, key_segments = segments
        allowed = allowed & (queries[:, :, None] == key_segments[:, None, :])  # (batch, queries, keys)
        return _additive(allowed[:, None], dtype)
    return _additive(allowed[None, None], dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with grouped key and value heads.

    Args:
        q: (batch, queries, heads, head_dim); k, v: (batch, keys, kv_heads, head_dim), heads a multiple of kv_heads.
        mask: additive, (batch or 1, 1, queries, keys); None if nothing needs masking beyond `causal`.
        causal: whether each token sees itself and the tokens before it alone; queries and keys are then the same tokens.

    Returns:
        (batch, queries, heads, head_dim)
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def band_block(window: int) -> int:
    """Queries per block. Blocks of half a window waste the least work; narrow windows take larger blocks, to keep each busy."""
    return window // 2 if window >= 256 else max(window, 32)


def is_banded(queries: int, window: int) -> bool:
    """Whether a row of this many queries is cut into bands; a shorter row is cheaper as one masked block."""
    return queries > window + band_block(window)


def sliding_mask(
    queries: int, past: int, window: int, segments: tuple[Tensor, Tensor] | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The mask that `sliding_attention` expects.

    Args:
        queries: number of new tokens.
        past: number of cached keys before the first query, at most window - 1.
        window: keys that a token sees, itself included.
        segments: segments of the queries, (batch, queries), and of the keys, (batch, past + queries); None for one segment.
        dtype: dtype of the queries.

    Returns:
        None where plain causal attention does the same; (batch or 1, 1, queries, past + queries) for short rows;
        (batch or 1, blocks, block, keys of a block) for bands, whose size is linear in the number of queries.
    """
    if not is_banded(queries, window):
        if segments is None and past + queries <= window and (past == 0 or queries == 1):
            return None
        i = torch.arange(queries, device=device)[:, None] + past
        j = torch.arange(past + queries, device=device)
        allowed = (j <= i) & (j > i - window)
        if segments is None:
            return _additive(allowed[None, None], dtype)
        return _additive((allowed & (segments[0][:, :, None] == segments[1][:, None, :]))[:, None], dtype)

    block, before, blocks = _layout(queries, window)
    i = torch.arange(block, device=device)[:, None] + before * block
    j = torch.arange((before + 1) * block, device=device)
    band = (j <= i) & (j > i - window)  # (block, keys of a block)
    first_key = torch.arange(blocks, device=device)[:, None] * block - (before * block - past)
    exists = first_key + j >= 0  # (blocks, keys of a block)
    allowed = (band & exists[:, None, :])[None]
    if segments is not None:
        query_blocks = _query_blocks(segments[0], block, blocks)  # (batch, blocks, block)
        key_blocks = _key_blocks(segments[1], past, block, before, blocks)  # (batch, blocks, keys of a block)
        # Queries that only fill up the last block ignore segments and so see themselves at least: no softmax is empty.
        same = query_blocks[..., :, None] == key_blocks[..., None, :]
        filler = torch.arange(blocks * block, device=device).view(blocks, block, 1) >= queries
        allowed = allowed & (same | filler)
    return _additive(allowed, dtype)


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """Causal attention in which token i sees the `window` keys i - window + 1 .. i, itself included.

    A long row is cut into blocks of queries, and each block attends to its own band of keys, so time and memory are linear in
    the number of tokens.

    Args:
        q: (batch, queries, heads, head_dim).
        k, v: (batch, past + queries, kv_heads, head_dim), with at most window - 1 past keys.
        mask: what `sliding_mask` returns for these lengths.

    Returns:
        (batch, queries, heads, head_dim)
    """
    batch, queries, heads, head_dim = q.shape
    past = k.shape[1] - queries
    if not is_banded(queries, window):
        return attend(q, k, v, mask, causal=mask is None and queries > 1)
    assert mask is not None
    block, before, blocks = _layout(queries, window)
    mask = mask.expand(batch, *mask.shape[1:]).reshape(batch * blocks, 1, block, (before + 1) * block)
    q = _query_blocks(q, block, blocks).flatten(0, 1)  # (batch * blocks, block, heads, head_dim)
    k = _key_blocks(k, past, block, before, blocks).flatten(0, 1)  # (batch * blocks, keys of a block, kv_heads, head_dim)
    v = _key_blocks(v, past, block, before, blocks).flatten(0, 1)
    out = attend(q, k, v, mask)
    return out.reshape(batch, blocks * block, heads, head_dim)[:, :queries]


def _layout(queries: int, window: int) -> tuple[int, int, int]:
    """Queries per block; how many blocks of keys a block of queries sees before its own; number of blocks of queries."""
    block = band_block(window)
    return block, -(-(window - 1) // block), -(-queries // block)


def _query_blocks(x: Tensor, block: int, blocks: int) -> Tensor:
    """(batch, queries, ...) -> (batch, blocks, block, ...), padded with zeros."""
    x = _pad_tokens(x, 0, blocks * block - x.shape[1])
    return x.unflatten(1, (blocks, block))


def _key_blocks(x: Tensor, past: int, block: int, before: int, blocks: int) -> Tensor:
    """(batch, past + queries, ...) -> (batch, blocks, (before + 1) * block, ...): the keys that each block of queries sees."""
    x = _pad_tokens(x, before * block - past, (blocks * block + past) - x.shape[1])
    x = x.unflatten(1, (before + blocks, block))
    return torch.cat([x[:, j : j + blocks] for j in range(before + 1)], dim=2)


def _pad_tokens(x: Tensor, left: int, right: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 2) + (left, right)) if left or right else x


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
