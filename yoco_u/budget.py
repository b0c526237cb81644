"""What an architecture costs: parameters, FLOPs, and bytes, by arithmetic on its stage list. Nothing here needs torch.

FLOPs are model FLOPs: two for each weight of a matrix product and each time it is applied, and those of the attention
products over the keys that are visible. Norms, activations, rotations, masked work and recomputation are not counted.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from yoco_u.architecture import Architecture, Stage

KVType = Literal["float32", "bfloat16", "int8"]
"""What a cache holds its keys and values as."""

OPTIMIZER_BYTES_PER_PARAMETER = 16
"""float32 training by AdamW: the weight, its gradient and two moments, 4 bytes each."""

_RETENTION_BYTES_PER_ELEMENT = 4  # the recurrent state is float32 whatever the model's dtype


class Parameters(NamedTuple):
    """Parameter counts.

    Attributes:
        total: all of them; tied embeddings count once.
        active: those that one token meets: all but the experts that it does not visit.
        embedding: the token embedding alone, which is the LM head as well where they are tied.
    """

    total: int
    active: int
    embedding: int


def parameters(a: Architecture) -> Parameters:
    embedding = a.vocab_size * a.hidden_size
    total = embedding * (1 if a.tie_word_embeddings else 2) + a.hidden_size  # and the final norm
    unvisited = 0
    for stage in a.stages:
        total += stage.layers * (_attention_parameters(a, stage) + _feed_forward_parameters(a) + 2 * a.hidden_size)
        total += stage.loops - 1 if stage.loop_gate is not None else 0
        if a.experts:
            idle = a.experts.num_experts - a.experts.experts_per_token
            unvisited += stage.layers * idle * _expert_weights(a)
    if a.has_global_kv:
        total += a.hidden_size + _global_kv_weights(a) + (a.head_dim if a.qk_norm else 0)
    total += _mixer_weights(a)
    return Parameters(total, total - unvisited, embedding)


def forward_flops(a: Architecture, context: int) -> float:
    """Model FLOPs per token of a forward pass over `context` tokens, all of whose logits are computed.

    Loops and the LM head are counted, the embedding's look-up is not. Each kind of attention is averaged over the positions:
    full and cross see (context + 1) / 2 keys, sliding the mean of min(i, window). A recurrent step of retention updates and
    reads one head_dim x head_dim state a head.
    """
    return _token_flops(a, lambda window: mean_visible_keys(context, window))


def decode_flops(a: Architecture, context: int) -> float:
    """Model FLOPs of one new token that sees `context` tokens, itself included, up to the logits of the next."""
    return _token_flops(a, lambda window: context if window is None else min(context, window))


def training_flops(a: Architecture, sequence_length: int) -> float:
    """Model FLOPs per token of a forward and a backward pass over rows of `sequence_length`: three forward passes."""
    return 3 * forward_flops(a, sequence_length)


def prefill_flops(a: Architecture, context: int) -> float:
    """Model FLOPs of a whole prefill: from `context` prompt tokens to the logits of the first new one.

    All tokens run the stages that write caches, and the global KV projection. The cross-decoder, which writes none, and the
    LM head run for the last token alone.
    """
    streams = a.parallel.streams if a.parallel else 1
    every, last = 0.0, 2.0 * (a.vocab_size * a.hidden_size + _mixer_weights(a))
    for stage in a.stages:
        applied = stage.layers * stage.loops * streams
        weights = 2 * (_attention_weights(a, stage) + _active_feed_forward_weights(a))
        if stage.attention == "cross":
            last += applied * (weights + _attention_product_flops(a, stage, context))
        else:
            every += applied * (weights + _attention_product_flops(a, stage, _mean_keys(a, stage, context)))
    if a.has_global_kv:
        every += 2 * _global_kv_weights(a)
    return every * context + last


def decode_bytes(
    a: Architecture, context: int, batch: int = 1, bytes_per_weight: float = 2, bytes_per_element: float = 2
) -> float:
    """Bytes that one decode step of `batch` sequences must read: weights once a step, and every sequence's keys and values.

    Weights are counted each time they are applied, so once a loop, and the LM head is among them; vectors (norms, gates) and
    the embedding's row are left out. Of routed experts, as many are read as the batch visits on average if all are as likely.
    Each cross layer and loop reads the whole global KV. Retention reads its float32 states.

    Args:
        context: tokens that a new token sees, itself included.
        bytes_per_weight: 2 for bfloat16; a fraction where scales come with quantized weights.
        bytes_per_element: of the caches.
    """
    rows, states = 0, 0
    for stage in a.stages:
        applied = stage.layers * stage.loops
        if stage.attention == "retention":
            states += applied * a.num_attention_heads * a.head_dim**2
        elif stage.attention == "sliding":
            rows += applied * min(context, _window(a))
        else:
            streams, prefix = (a.parallel.streams, a.parallel.prefix_tokens) if a.parallel else (1, 0)
            rows += applied * streams * (context + prefix)
    kept = rows * _row_elements(a) * bytes_per_element + states * _RETENTION_BYTES_PER_ELEMENT
    return _read_weights(a, batch, batch) * bytes_per_weight + batch * kept


def prefill_bytes(a: Architecture, context: int, bytes_per_weight: float = 2, bytes_per_element: float = 2) -> float:
    """Bytes that a prefill of one prompt must move, however well it keeps the rest in the processor.

    Weights each time they are applied, by the whole prompt together, as in `decode_bytes`; the caches once, as they are
    written; and the global KV once for each cross layer and loop, which the last token reads.
    """
    crossing = sum(stage.layers * stage.loops for stage in a.stages if stage.attention == "cross")
    read = crossing * context * _row_elements(a) * bytes_per_element
    return _read_weights(a, context, 1) * bytes_per_weight + kv_bytes(a, context, bytes_per_element) + read


def kv_bytes(a: Architecture, tokens: int, bytes_per_element: float = 2) -> int:
    """Bytes that one sequence of `tokens` keeps for decoding.

    The global KV, one ring of `window` rows per (loop, sliding layer), all rows per (loop, full layer) and ParScale stream,
    and one float32 state per (loop, retention layer).
    """
    return cache_bytes(a, tokens, 1, min(tokens, a.window) if a.window else 0, bytes_per_element)


def cache_bytes(a: Architecture, tokens: int, sequences: int, window: int, bytes_per_element: float = 2) -> int:
    """Bytes of an engine's caches: `tokens` rows of all that grows, rings of `window` rows and states for `sequences`."""
    row = _row_elements(a) * bytes_per_element
    total = tokens * row if a.has_global_kv else 0.0
    for slot in a.slots():
        if slot.attention == "full":
            total += tokens * row * (a.parallel.streams if a.parallel else 1)
        elif slot.attention == "sliding":
            total += sequences * window * row
        elif slot.attention == "retention":
            total += sequences * a.num_attention_heads * a.head_dim**2 * _RETENTION_BYTES_PER_ELEMENT
    return round(total)


def bytes_per_kv_element(a: Architecture, kind: KVType) -> float:
    """Of keys and values kept as `kind`; int8 has one float32 scale per key and per value of `head_dim`."""
    return {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / a.head_dim}[kind]


def optimizer_bytes(a: Architecture) -> int:
    """Bytes of weights, gradients and optimizer state in training, over all processes that share the model."""
    return OPTIMIZER_BYTES_PER_PARAMETER * parameters(a).total


def mean_visible_keys(context: int, window: int | None = None) -> float:
    """Keys that a token sees causally, the token itself included, averaged over the positions of a row.

    Args:
        window: most keys that are seen; None for all.
    """
    if window is None or window >= context:
        return (context + 1) / 2
    return window * (window + 1) / 2 / context + (context - window) * window / context


def _mean_keys(a: Architecture, stage: Stage, context: int) -> float:
    return mean_visible_keys(context, a.window if stage.attention == "sliding" else None)


def _token_flops(a: Architecture, visible_keys: Callable[[int | None], float]) -> float:
    """FLOPs of one token through everything, LM head included.

    Args:
        visible_keys: how many keys it sees through a window, or without one.
    """
    streams = a.parallel.streams if a.parallel else 1
    flops = 2.0 * (a.vocab_size * a.hidden_size + _mixer_weights(a))
    for stage in a.stages:
        weights = _attention_weights(a, stage) + _active_feed_forward_weights(a)
        keys = visible_keys(a.window if stage.attention == "sliding" else None)
        flops += stage.layers * stage.loops * streams * (2 * weights + _attention_product_flops(a, stage, keys))
    if a.has_global_kv:
        flops += 2 * _global_kv_weights(a)
    return flops


def _attention_product_flops(a: Architecture, stage: Stage, keys: float) -> float:
    """FLOPs per token of what attention multiplies besides weights, for one layer and stream, over `keys` visible keys."""
    width = a.num_attention_heads * a.head_dim
    if stage.attention == "retention":
        return 4 * width * a.head_dim  # k^T v into the state, q times the state
    prefix = a.parallel.prefix_tokens if a.parallel else 0
    return 4 * width * (keys + prefix)


def _attention_weights(a: Architecture, stage: Stage) -> int:
    """Weights of one layer's projections."""
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    if stage.attention == "cross":
        return a.hidden_size * 2 * queries
    weights = a.hidden_size * (2 * queries + 2 * keys)
    if stage.attention == "retention":
        weights += a.hidden_size * (queries + a.num_attention_heads)  # the output's gate, the decay
    return weights


def _attention_parameters(a: Architecture, stage: Stage) -> int:
    norms = {"full": 2, "sliding": 2, "cross": 1, "retention": 0}[stage.attention] if a.qk_norm else 0
    count = _attention_weights(a, stage) + norms * a.head_dim
    if a.parallel:
        count += 2 * a.parallel.prefix_tokens * a.parallel.streams * a.num_key_value_heads * a.head_dim
    return count


def _feed_forward_parameters(a: Architecture) -> int:
    if a.experts is None:
        return 3 * a.hidden_size * a.intermediate_size
    experts = a.experts.num_experts + a.experts.shared_experts
    return experts * _expert_weights(a) + a.hidden_size * a.experts.num_experts  # and the router


def _active_feed_forward_weights(a: Architecture) -> int:
    if a.experts is None:
        return 3 * a.hidden_size * a.intermediate_size
    visited = a.experts.experts_per_token + a.experts.shared_experts
    return visited * _expert_weights(a) + a.hidden_size * a.experts.num_experts


def _read_weights(a: Architecture, tokens: int, crossing: int) -> float:
    """Weights, each as often as it is applied, that a step of `tokens` needs of which `crossing` run the cross-decoder."""
    weights = float(a.vocab_size * a.hidden_size + _mixer_weights(a))
    weights += _global_kv_weights(a) if a.has_global_kv else 0
    for stage in a.stages:
        met = crossing if stage.attention == "cross" else tokens
        weights += stage.layers * stage.loops * (_attention_weights(a, stage) + _read_feed_forward_weights(a, met))
    return weights


def _read_feed_forward_weights(a: Architecture, tokens: int) -> float:
    """Weights of one layer's feed-forward that `tokens` need together."""
    if a.experts is None:
        return 3 * a.hidden_size * a.intermediate_size
    missed = (1 - a.experts.experts_per_token / a.experts.num_experts) ** tokens
    visited = a.experts.num_experts * (1 - missed) + a.experts.shared_experts
    return visited * _expert_weights(a) + a.hidden_size * a.experts.num_experts


def _expert_weights(a: Architecture) -> int:
    assert a.experts is not None
    return 3 * a.hidden_size * a.experts.intermediate_size


def _row_elements(a: Architecture) -> int:
    """Numbers in one token's keys and values of one layer."""
    return 2 * a.num_key_value_heads * a.head_dim


def _global_kv_weights(a: Architecture) -> int:
    return 2 * a.hidden_size * a.num_key_value_heads * a.head_dim


def _mixer_weights(a: Architecture) -> int:
    """Weights that mix the streams of ParScale."""
    if a.parallel is None:
        return 0
    return a.parallel.streams * a.hidden_size * a.hidden_size + a.hidden_size * a.parallel.streams


def _window(a: Architecture) -> int:
    assert a.window is not None
    return a.window
