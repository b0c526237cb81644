"""Every kernel in plain torch: what runs where there is no fast one, and what the fast ones are tested against."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from yoco_u.model.attention import attend, full_mask, sliding_attention, sliding_mask
from yoco_u.model.backend import runs_blockwise
from yoco_u.model.cpu_attention import block_attention
from yoco_u.model.retention import recurrent_retention


def store_rows(k: Tensor, v: Tensor, rows: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """See `yoco_u.inference.kernels.store_rows`."""
    kv = torch.stack([k, v])[:, rows >= 0].transpose(1, 2)  # (2, kv_heads, written tokens, head_dim)
    rows = rows[rows >= 0]
    if scales is None:
        cache.index_copy_(2, rows, kv.to(cache.dtype))
        return
    whole, factors = quantized(kv)
    cache.index_copy_(2, rows, whole)
    scales.index_copy_(2, rows, factors)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., head_dim) as int8, and one float32 scale for each vector of head_dim, (...)."""
    scales = x.float().abs().amax(-1).clamp(min=1e-30) / 127
    return (x.float() / scales[..., None]).round_().to(torch.int8), scales


def decode_attention(
    q: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    block_table: Tensor,
    block_size: int,
    lengths: Tensor,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `yoco_u.inference.kernels.decode_attention`; here one sequence after another, over copies of the rows it sees."""
    out = torch.zeros_like(q)
    within = torch.arange(block_size, device=q.device)
    for i, length in enumerate(lengths.tolist()):
        blocks = block_table[i, : -(-length // block_size)].long()
        rows = (blocks[:, None] * block_size + within).flatten()[:length]
        kv = cache[:, :, rows].float()  # (2, kv_heads, length, head_dim)
        if scales is not None:
            kv = kv * scales[:, :, rows, None]
        if prefix is not None:
            kv = torch.cat([torch.stack(prefix).transpose(1, 2).float(), kv], dim=2)
        if kv.shape[2]:
            query = q[i].float().view(kv.shape[1], -1, q.shape[-1])  # (kv_heads, groups, head_dim)
            out[i] = scaled_dot_product_attention(query, kv[0], kv[1]).flatten(0, 1).to(q.dtype)
    return out


def prefix_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of all queries to the same keys, and its log-sum-exp.

    Args:
        q: (sequences, heads, head_dim).
        k, v: (prefix, kv_heads, head_dim).

    Returns:
        (sequences, heads, head_dim) and (sequences, heads), float32.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # (sequences, kv_heads, groups, head_dim)
    scores = torch.einsum("skgd,pkd->skgp", grouped, k.float()) * q.shape[-1] ** -0.5
    out = torch.einsum("skgp,pkd->skgd", scores.softmax(-1), v.float())
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1)


def retention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, seats: Tensor) -> Tensor:
    """See `yoco_u.inference.kernels.retention_step`."""
    running = seats >= 0
    seats, out = seats[running].long(), torch.zeros_like(q)
    q, k, v, log_decay = (x[running, None] for x in (q, k, v, log_decay))
    stepped, states[seats] = recurrent_retention(q, k, v, log_decay, states[seats])
    out[running] = stepped[:, 0]
    return out


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """See `yoco_u.inference.kernels.chunk_attention`."""
    queries, keys = q.shape[1], k.shape[1]
    if runs_blockwise(queries, q.device):
        return block_attention(q, k, v, keys if window is None else window, None, None)
    if window is None:
        positions = torch.arange(keys - queries, keys, device=q.device)
        return attend(q, k, v, full_mask(positions, keys, None, q.dtype))
    return sliding_attention(q, k, v, window, sliding_mask(queries, keys - queries, window, None, q.dtype, q.device))
