"""GPU paths on a CPU: a stand-in for torch's variable-length flash attention, and the switches that make the model use it."""

import math

import pytest
import torch
from torch import Tensor

from yoco_u.inference.kernels import varlen
from yoco_u.model import backend, gpu_attention, segments
from yoco_u.training import forward


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What torch 2.11 documents, sequence by sequence: scores of all pairs, most of them masked, in the dtype of the inputs.

    The last query of a sequence is aligned with its last key. Query i at key position p sees the keys p - left .. p + right of
    `window_size`, without an end on the side of a -1. Fewer heads of keys than of queries are grouped.
    """
    assert return_aux is None and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    left, right = (math.inf if side < 0 else side for side in window_size)
    groups = query.shape[1] // key.shape[1]
    bounds_q, bounds_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert bounds_q[0] == bounds_k[0] == 0 and len(bounds_q) == len(bounds_k)
    assert bounds_q[-1] == len(query) and bounds_k[-1] == len(key) == len(value)
    outputs = []
    for first, last, first_key, last_key in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        queries, keys = last - first, last_key - first_key
        assert 0 <= queries <= max_q and 0 <= keys <= max_k
        q = query[first:last].transpose(0, 1)  # (heads, queries, head_dim)
        k, v = (x[first_key:last_key].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
        scores = scores.masked_fill((ahead < -left) | (ahead > right), -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def use_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make models on the CPU go the way of GPUs, in any dtype: flash attention, and no look at values."""
    for module in (backend, varlen):
        monkeypatch.setattr(module, "runs_flash", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(gpu_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(gpu_attention, "_NAMES_GROUPED_HEADS", False)
    for module in (segments, forward):
        monkeypatch.setattr(module, "host_waits", lambda device: True)
