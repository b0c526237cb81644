"""Attention span: how far back each layer looks.

The model's kernels do not return attention weights, so the weights are computed here, by a plain softmax over captured queries
and keys, for some positions of every row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.analysis.trace import Attended, last_states, unroll, watch_attention
from yoco_u.data import Batch
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM

QUERIES = 64
_SCORES_ALIVE = 1 << 24
_EDGES = (0, *(1 << i for i in range(48)))  # shortest distance of each bucket


@dataclass(frozen=True)
class AttentionSpan:
    """Where one unrolled layer looks; all values are means over queries and heads.

    Attributes:
        layer: number of the layer in the unrolled depth, from 1.
        distance: mean distance in tokens, weighted by attention; a token is 0 tokens from itself. Learned prefixes are left
            out.
        even_distance: the distance if every visible token had the same weight.
        entropy: entropy of the attention weights, in nats.
        even_entropy: the entropy if every visible key had the same weight, which is the maximum.
        first_token: weight on the first token of the document, averaged over the queries that see it and are not it; None if
            there is no such query.
        prefix: weight on learned prefix keys (ParScale).
        mass: weight in each bucket of distances, see `AttentionSpans.buckets`; with `prefix` it sums to 1.
    """

    layer: int
    distance: float
    even_distance: float
    entropy: float
    even_entropy: float
    first_token: float | None
    prefix: float
    mass: list[float]


@dataclass(frozen=True)
class AttentionSpans:
    """The attention spans of a model.

    Attributes:
        buckets: shortest distance of each bucket: 0, 1, 2, 4, 8 ...; a bucket ends where the next one begins.
        queries: number of positions whose attention was computed, over all rows.
        layers: spans of all unrolled layers with softmax attention.
    """

    buckets: list[int]
    queries: int
    layers: list[AttentionSpan]


@torch.no_grad()
def attention_spans(
    model: YocoUForCausalLM, batches: Iterable[Batch], num_loops: int | None = None, queries: int = QUERIES
) -> AttentionSpans:
    """Measure the attention of evenly spaced positions of every row.

    The scores in memory are `queries` rows at most, never a square of tokens x tokens.

    Args:
        num_loops: loop count of the passes; the model's own by default.
        queries: positions per row.

    Raises:
        UserError: if no layer has softmax attention.
    """
    architecture = model.model.at_loops(num_loops)
    layers = [layer.number for layer in unroll(architecture) if layer.attention != "retention"]
    if not layers:
        raise UserError("all layers are gated retention, which has no attention weights; expected another kind of stage")
    sums = {number: _Sums() for number in layers}
    seen, longest = 0, 0
    for batch in batches:
        rows, tokens = batch["input_ids"].shape
        positions = torch.linspace(0, tokens - 1, min(queries, tokens), device=model.device).round().long()

        def see(number: int, attended: Attended, positions: Tensor = positions) -> None:
            sums[number].add(attended, positions)

        with watch_attention(model, see):
            last_states(model, batch, num_loops)
        seen, longest = seen + rows * len(positions), max(longest, tokens)
    buckets = [edge for edge in _EDGES if edge < longest]
    return AttentionSpans(buckets, seen, [sums[number].mean(number, len(buckets)) for number in layers])


def visible_keys(attended: Attended, positions: Tensor) -> Tensor:
    """Which tokens the queries at some positions see, (rows or 1, positions, tokens). A learned prefix is not among them."""
    back = _back(attended, positions)
    visible = (back >= 0)[None]
    if attended.window is not None:
        visible = visible & (back < attended.window)
    if attended.segments is not None:
        visible = visible & (attended.segments[:, positions, None] == attended.segments[:, None, :])
    return visible


def attention_weights(attended: Attended, positions: Tensor) -> Tensor:
    """`softmax(q k / sqrt(head_dim))` for the queries at some positions, (rows, heads, positions, prefix + tokens)."""
    q, k = attended.q[:, positions], attended.k
    q = q.unflatten(2, (k.shape[2], -1))  # (rows, positions, kv_heads, groups, head_dim)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q.to(dtype), k.to(dtype)).flatten(1, 2) * q.shape[-1] ** -0.5
    scores[..., attended.prefix :].masked_fill_(~visible_keys(attended, positions)[:, None], float("-inf"))
    return scores.softmax(dim=-1)


def _back(attended: Attended, positions: Tensor) -> Tensor:
    """Distance in tokens from each query back to each token, (positions, tokens); negative for later tokens."""
    return positions[:, None] - torch.arange(attended.q.shape[1], device=positions.device)


class _Sums:
    """Sums of one layer's values over queries, each value a mean over heads."""

    def __init__(self) -> None:
        self.queries = self.far_queries = 0
        self.distance = self.even_distance = self.entropy = self.even_entropy = self.first = self.prefix = 0.0
        self.mass = torch.zeros(len(_EDGES), dtype=torch.float64)

    def add(self, attended: Attended, positions: Tensor) -> None:
        rows, _, heads, _ = attended.q.shape
        step = max(1, _SCORES_ALIVE // (rows * heads * attended.k.shape[1]))
        for part in positions.split(step):
            self._add(attended, part)

    def _add(self, attended: Attended, positions: Tensor) -> None:
        weights = attention_weights(attended, positions)  # (rows, heads, positions, prefix + tokens)
        visible = visible_keys(attended, positions).expand(len(weights), -1, -1)  # (rows, positions, tokens)
        back = _back(attended, positions).clamp(min=0)
        self.queries += visible.shape[0] * visible.shape[1]
        self.entropy += float(torch.special.entr(weights).sum(-1).mean(1).sum(dtype=torch.float64))
        keys = visible.sum(-1)
        self.even_entropy += float((keys + attended.prefix).double().log().sum())
        self.even_distance += float(((visible * back).sum(-1) / keys).sum(dtype=torch.float64))

        own = weights[..., attended.prefix :]
        of_tokens = own.sum(-1).clamp(min=torch.finfo(own.dtype).tiny)
        self.prefix += float(weights[..., : attended.prefix].sum(-1).mean(1).sum(dtype=torch.float64))
        self.distance += float(((own * back).sum(-1) / of_tokens).mean(1).sum(dtype=torch.float64))
        mass = own.mean(1)  # (rows, positions, tokens)
        bucket = torch.bucketize(back, torch.tensor(_EDGES, device=back.device), right=True) - 1
        self.mass.index_add_(0, bucket.flatten().cpu(), mass.sum(0).double().flatten().cpu())
        self._add_first(attended, positions, visible, mass)

    def _add_first(self, attended: Attended, positions: Tensor, visible: Tensor, mass: Tensor) -> None:
        if attended.segments is None:
            first = torch.zeros_like(visible[..., :1], dtype=torch.long)
        else:
            same = attended.segments[:, positions, None] == attended.segments[:, None, :]
            first = same.int().argmax(dim=-1, keepdim=True)  # (rows, positions, 1)
        behind = visible.gather(-1, first) & (first < positions[:, None])
        self.far_queries += int(behind.sum())
        self.first += float((mass.gather(-1, first) * behind).sum(dtype=torch.float64))

    def mean(self, layer: int, buckets: int) -> AttentionSpan:
        n = self.queries
        return AttentionSpan(
            layer=layer,
            distance=self.distance / n,
            even_distance=self.even_distance / n,
            entropy=self.entropy / n,
            even_entropy=self.even_entropy / n,
            first_token=self.first / self.far_queries if self.far_queries else None,
            prefix=self.prefix / n,
            mass=(self.mass[:buckets] / n).tolist(),
        )
