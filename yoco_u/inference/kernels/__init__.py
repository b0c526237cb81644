"""What a decode step does besides matrix products: compiled C++ on a CPU, plain torch wherever that is missing.

The C++ is built on first use (some seconds) and kept in torch's cache of extensions. `YOCO_U_KERNELS=off` does without. Each
kernel has its direct twin beside it or in `yoco_u.model`, and the tests compare them.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from yoco_u.inference.kernels.cpu import compiled


def store_rows(k: Tensor, v: Tensor, rows: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """Write keys and values into a cache.

    Args:
        k, v: (tokens, kv_heads, head_dim).
        rows: of the cache, (tokens,), int64.
        cache, scales: as in `decode_attention`.
    """
    if k.device.type == "cpu" and compiled():
        torch.ops.yoco_u.store_rows(k, v, rows, cache, scales)
        return
    kv = torch.stack([k, v]).transpose(1, 2)  # (2, kv_heads, tokens, head_dim)
    if scales is None:
        cache.index_copy_(2, rows, kv.to(cache.dtype))
        return
    whole, factors = quantized(kv)
    cache.index_copy_(2, rows, whole)
    scales.index_copy_(2, rows, factors)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of (..., head_dim), and one float32 scale a row."""
    scales = x.float().abs().amax(-1).clamp(min=1e-30) / 127
    return (x.float() / scales[..., None]).round_().to(torch.int8), scales


def decode_attention(
    q: Tensor, cache: Tensor, scales: Tensor | None, table: Tensor, block_size: int, lengths: Tensor
) -> Tensor:
    """Attention of one query per sequence over the rows of its blocks.

    Args:
        q: (sequences, heads, head_dim).
        cache: keys and values, (2, kv_heads, blocks * block_size, head_dim), float32, bfloat16 or int8.
        scales: of an int8 cache, (2, kv_heads, blocks * block_size), float32.
        table: block numbers, (sequences, blocks), int32.
        lengths: rows that each query sees, (sequences,), int64, at least 1.

    Returns:
        (sequences, heads, head_dim), in the dtype of q; computed in float32.
    """
    if q.device.type != "cpu" or not compiled():
        return decode_attention_direct(q, cache, scales, table, block_size, lengths)
    return torch.ops.yoco_u.decode_attention(q, cache, scales, table, block_size, lengths)


def decode_attention_direct(
    q: Tensor, cache: Tensor, scales: Tensor | None, table: Tensor, block_size: int, lengths: Tensor
) -> Tensor:
    """The same, sequence by sequence, gathering the rows."""
    out = torch.empty_like(q)
    within = torch.arange(block_size, device=q.device)
    for i, length in enumerate(lengths.tolist()):
        blocks = table[i, : -(-length // block_size)].long()
        rows = (blocks[:, None] * block_size + within).flatten()[:length]
        kv = cache[:, :, rows].float()  # (2, kv_heads, length, head_dim)
        if scales is not None:
            kv = kv * scales[:, :, rows, None]
        query = q[i].float().view(kv.shape[1], -1, q.shape[-1])  # (kv_heads, groups, head_dim)
        out[i] = scaled_dot_product_attention(query, kv[0], kv[1]).flatten(0, 1).to(q.dtype)
    return out
