"""What an architecture costs in parameters, FLOPs and bytes, by arithmetic on its stage list. Nothing here needs torch.

FLOPs are model FLOPs: two per weight of a matrix product each time the weight is applied, plus the attention products over
visible keys. Norms, activations, rotations, masked work and recomputation are not counted.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from yoco_u.architecture import Architecture, Stage

KVType = Literal["float32", "bfloat16", "int8"]
"""The formats in which a cache can hold its keys and values."""

OPTIMIZER_BYTES_PER_PARAMETER = 16
"""float32 training with AdamW holds the weight, its gradient and two moments, 4 bytes each."""

_RETENTION_BYTES_PER_ELEMENT = 4  # the recurrent state is float32 whatever the model's dtype


class Parameters(NamedTuple):
    """Parameter counts.

    Attributes:
        total: all parameters; a tied embedding and LM head count once.
        active: the parameters that one token meets: all but the experts that it does not visit.
        embedding: the parameters of the token embedding, which are also those of a tied LM head.
    """

    total: int
    active: int
    embedding: int


def parameters(a: Architecture) -> Parameters:
    """Count the parameters of a model; loops share theirs, so only loop gates depend on the loop count."""
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
        total += a.hidden_size + _global_kv_weights(a) + (a.global_kvs * a.head_dim if a.qk_norm else 0)
        total += a.global_kvs * _row_elements(a) if a.attention_bias else 0
    total += _mixer_weights(a)
    return Parameters(total, total - unvisited, embedding)


def forward_flops(a: Architecture, context: int) -> float:
    """Model FLOPs per token of a forward pass over `context` tokens that computes the logits of all of them.

    Loops and the LM head are counted, the embedding's look-up is not. Attention is averaged over the positions: full and cross
    attention see (context + 1) / 2 keys, sliding attention the mean of min(i, window). Retention is counted as a recurrent
    step, which updates and reads one head_dim x head_dim state per head.
    """
    return _token_flops(a, lambda window: mean_visible_keys(context, window))


def self_decoder_flops(a: Architecture, context: int) -> float:
    """The part of `forward_flops` that is not in the cross stages, the global KVs or the LM head."""
    stages = tuple(stage for stage in a.stages if stage.attention != "cross")
    return forward_flops(a.model_copy(update={"stages": stages, "global_kvs": 1}), context) - head_flops(a)


def head_flops(a: Architecture) -> float:
    """Model FLOPs per token of the LM head."""
    return 2.0 * a.vocab_size * a.hidden_size


def decode_flops(a: Architecture, context: int) -> float:
    """Model FLOPs of decoding one token that sees `context` tokens, itself included. The LM head is counted."""
    return _token_flops(a, lambda window: context if window is None else min(context, window))


def training_flops(a: Architecture, sequence_length: int) -> float:
    """Model FLOPs per token of training on rows of `sequence_length`; a backward pass counts as two forward passes."""
    return 3 * forward_flops(a, sequence_length)


def prefill_flops(a: Architecture, context: int) -> float:
    """Model FLOPs of a whole prefill, from `context` prompt tokens to the logits of the first new token.

    All tokens run the self-decoder, which writes caches, and the projection to the global KVs. The cross-decoder, which writes
    none, and the LM head run for the last token alone.
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
    """Bytes that one decode step of `batch` sequences must read: the weights, and every sequence's keys and values.

    Weights are counted each time they are applied: once per loop for the whole batch, LM head included. Vectors (norms, gates)
    and the embedding's rows are left out. The count of routed experts is the mean number of distinct experts that the batch
    visits if all are equally likely. Each cross layer and loop reads a whole global KV; retention reads its float32 states.

    Args:
        context: tokens that a new token sees, itself included.
        bytes_per_weight: 2 for bfloat16; more than 1 for int8, whose scales are read too.
        bytes_per_element: bytes of one number in the caches of keys and values.
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
    """Bytes that the prefill of one prompt must at least move, even if all intermediate results stay in the processor's caches.

    The weights count each time they are applied, as in `decode_bytes`, but once for the whole prompt. The caches count once,
    when they are written, and a global KV once more for each cross layer and loop, in which the last token reads it.
    """
    crossing = sum(stage.layers * stage.loops for stage in a.stages if stage.attention == "cross")
    read = crossing * context * _row_elements(a) * bytes_per_element
    return _read_weights(a, context, 1) * bytes_per_weight + kv_bytes(a, context, bytes_per_element) + read


def kv_bytes(a: Architecture, tokens: int, bytes_per_element: float = 2) -> int:
    """Bytes that one sequence of `tokens` keeps for decoding.

    These are the global KVs, the last `window` rows of each sliding slot, all rows of each full slot and ParScale stream, and
    one float32 state of each retention slot.
    """
    return cache_bytes(a, tokens, 1, min(tokens, a.window) if a.window else 0, bytes_per_element)


def cache_bytes(a: Architecture, tokens: int, sequences: int, window: int, bytes_per_element: float = 2) -> int:
    """Bytes of an engine's caches.

    Args:
        tokens: rows of each global KV and of each full slot, which all sequences share.
        sequences: how many sequences have a ring in each sliding slot and a state in each retention slot.
        window: rows of one ring.
        bytes_per_element: bytes of one number in the keys and values.
    """
    row = _row_elements(a) * bytes_per_element
    total = a.global_kvs * tokens * row if a.has_global_kv else 0.0
    total += a.num_slots("full") * tokens * row * (a.parallel.streams if a.parallel else 1)
    total += a.num_slots("sliding") * sequences * window * row
    state = a.num_attention_heads * a.head_dim**2 * _RETENTION_BYTES_PER_ELEMENT
    total += a.num_slots("retention") * sequences * state
    return round(total)


def bytes_per_kv_element(a: Architecture, kind: KVType) -> float:
    """Bytes of one number in keys and values kept as `kind`; int8 has a float32 scale for each vector of `head_dim` numbers."""
    return {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / a.head_dim}[kind]


def optimizer_bytes(a: Architecture) -> int:
    """Bytes of weights, gradients and optimizer state in training, over all processes that share the model."""
    return OPTIMIZER_BYTES_PER_PARAMETER * parameters(a).total


def mean_visible_keys(context: int, window: int | None = None) -> float:
    """Mean number of keys that a token sees in causal attention, itself included, over the positions of a row.

    Args:
        context: tokens of the row.
        window: the most keys that a token sees; None for no limit.
    """
    if window is None or window >= context:
        return (context + 1) / 2
    return window * (window + 1) / 2 / context + (context - window) * window / context


def _mean_keys(a: Architecture, stage: Stage, context: int) -> float:
    return mean_visible_keys(context, a.window if stage.attention == "sliding" else None)


def _token_flops(a: Architecture, visible_keys: Callable[[int | None], float]) -> float:
    """FLOPs of one token through the whole model, LM head included.

    Args:
        visible_keys: how many keys the token sees, as a function of the window, which is None outside sliding stages.
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
    """FLOPs per token of the attention products, which involve no weights, in one layer and stream, over `keys` keys."""
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
        weights += a.hidden_size * (queries + a.num_attention_heads)  # output gate, decay
    return weights


def _attention_parameters(a: Architecture, stage: Stage) -> int:
    norms = {"full": 2, "sliding": 2, "cross": 1, "retention": 0}[stage.attention] if a.qk_norm else 0
    count = _attention_weights(a, stage) + norms * a.head_dim
    if a.attention_bias:
        count += a.num_attention_heads * a.head_dim + (0 if stage.attention == "cross" else _row_elements(a))
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
    """Weights that a step reads, each counted as often as it is applied.

    Args:
        tokens: tokens of the step.
        crossing: how many of them run the cross-decoder.
    """
    weights = float(a.vocab_size * a.hidden_size + _mixer_weights(a))
    weights += _global_kv_weights(a) if a.has_global_kv else 0
    for stage in a.stages:
        met = crossing if stage.attention == "cross" else tokens
        weights += stage.layers * stage.loops * (_attention_weights(a, stage) + _read_feed_forward_weights(a, met))
    return weights


def _read_feed_forward_weights(a: Architecture, tokens: int) -> float:
    """Weights of one layer's feed-forward that `tokens` need together: each visited expert once, and the router."""
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
    return a.global_kvs * 2 * a.hidden_size * a.num_key_value_heads * a.head_dim


def _mixer_weights(a: Architecture) -> int:
    """Weights that mix the streams of ParScale."""
    if a.parallel is None:
        return 0
    return a.parallel.streams * a.hidden_size * a.hidden_size + a.hidden_size * a.parallel.streams


def _window(a: Architecture) -> int:
    assert a.window is not None
    return a.window
