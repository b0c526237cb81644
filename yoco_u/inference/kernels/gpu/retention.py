"""One decode step of gated retention, see `yoco_u.model.retention`: `S <- gamma S + k^T v`, `o = q S`."""

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 32


@triton.jit(do_not_specialize_on_alignment=["seats"])
def _step(
    q, k, v, log_decay, states, seats, out, q_token, q_head, k_token, k_head, v_token, v_head, decay_token, decay_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, heads, parts of the state's columns)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seat = tl.load(seats + token).to(tl.int64)
    d = tl.arange(0, DIM_PADDED)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    result = out + (token * HEADS + head) * HEAD_DIM + column
    if seat < 0:
        tl.store(result, tl.zeros((COLUMNS,), tl.float32), mask=column < HEAD_DIM)
        return
    queries = tl.load(q + token * q_token + head * q_head + d, mask=d < HEAD_DIM, other=0.0)
    keys = tl.load(k + token * k_token + head * k_head + d, mask=d < HEAD_DIM, other=0.0)
    values = tl.load(v + token * v_token + head * v_head + column, mask=column < HEAD_DIM, other=0.0)
    decay = tl.exp(tl.load(log_decay + token * decay_token + head * decay_head))
    place = states + (seat * HEADS + head) * HEAD_DIM * HEAD_DIM + d[:, None] * HEAD_DIM + column[None, :]
    exists = (d < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
    state = decay * tl.load(place, mask=exists, other=0.0) + keys[:, None] * values[None, :]
    tl.store(place, state, mask=exists)
    tl.store(result, tl.sum(queries[:, None] * state, axis=0), mask=column < HEAD_DIM)


def retention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, seats: Tensor, out: Tensor) -> None:
    """See `yoco_u.inference.kernels.retention_step`; writes `out`."""
    tokens, heads, head_dim = q.shape
    if tokens == 0:
        return
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    strides = [stride for x in (q, k, v, log_decay) for stride in x.stride()[:2]]
    columns = min(_COLUMNS, triton.next_power_of_2(head_dim))
    _step[tokens, heads, triton.cdiv(head_dim, columns)](
        q, k, v, log_decay, states, seats, out, *strides,
        HEADS=heads, HEAD_DIM=head_dim, DIM_PADDED=triton.next_power_of_2(head_dim), COLUMNS=columns, num_warps=4,
    )  # fmt: skip
