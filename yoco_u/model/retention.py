"""Gated retention (YOCO, arXiv 2405.05254, section 3): a linear attention whose state decays by a factor that each token sets.

`S_n = gamma_n S_(n-1) + k_n^T v_n`, `o_n = q_n S_n`. There are two implementations with the same results: token by token, for
decoding, and in chunks, for training and prefill. Both compute in float32.
"""

import torch
from torch import Tensor

CHUNK = 128


def recurrent_retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Retention token by token, as it is defined; decoding runs this.

    Args:
        q, k, v: (batch, tokens, heads, head_dim); k is already scaled.
        log_decay: log of gamma, (batch, tokens, heads), at most 0.
        state: the state before the first token, (batch, heads, head_dim of k, head_dim of v).

    Returns:
        Outputs (batch, tokens, heads, head_dim) and the state after the last token.
    """
    outputs = []
    for q_n, k_n, v_n, decay in zip(q.unbind(1), k.unbind(1), v.unbind(1), log_decay.exp().unbind(1), strict=True):
        state = decay[..., None, None] * state + k_n[..., :, None] * v_n[..., None, :]
        outputs.append((q_n[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def chunked_retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Retention in chunks: matrix products inside a chunk, one step of the recurrence from chunk to chunk.

    Args:
        q, k, v, log_decay, state: as in `recurrent_retention`.
        documents: document of each token, (batch, tokens), never decreasing; the state is reset to zero where a document
            begins. `state` is that of the first token's document.

    Returns:
        As `recurrent_retention`.
    """
    if documents is None:
        documents = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    outputs = []
    last = documents[:, :1]  # the document that the state holds
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        q_c, k_c, v_c = (x[:, part].transpose(1, 2) for x in (q, k, v))  # (batch, heads, chunk, head_dim)
        document = documents[:, None, part]  # (batch, 1, chunk)
        decay = log_decay[:, part].transpose(1, 2).cumsum(-1)  # (batch, heads, chunk), summed from the chunk's beginning

        from_state = decay.exp() * (document == last[..., None])
        out = (q_c @ state) * from_state[..., None]

        between = decay[..., :, None] - decay[..., None, :]
        visible = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).tril()
        visible = visible & (document[..., :, None] == document[..., None, :])
        weights = between.masked_fill(~visible, float("-inf")).exp()
        outputs.append(out + ((q_c @ k_c.transpose(-1, -2)) * weights) @ v_c)

        end = document[..., -1]
        to_end = (decay[..., -1:] - decay).exp() * (document == end[..., None])
        state = state * (decay[..., -1].exp() * (end == last))[..., None, None]
        state = state + (k_c * to_end[..., None]).transpose(-1, -2) @ v_c
        last = end
    return torch.cat(outputs, dim=2).transpose(1, 2), state
