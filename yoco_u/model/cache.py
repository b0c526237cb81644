"""The cache of `generate()`: one layer of transformers' `Cache` for each slot with a cache, and for each global KV."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from yoco_u.architecture import Architecture
from yoco_u.errors import UserError


class RetentionLayer(CacheLayerMixin):
    """The recurrent state of one gated-retention slot; its size does not depend on the number of tokens.

    The state is kept in `keys`, because transformers reorders and repeats `keys` and `values` for beam search.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Replace the state.

        Args:
            key_states: the new state, (batch, heads, head_dim, head_dim).
            value_states: an empty tensor, (batch, 0), so that `values` can be reordered too.
            kwargs: `tokens`, the number of tokens by which the new state is ahead of the old one.
        """
        self.lazy_initialization(key_states, value_states)
        self.cumulative_length += kwargs["tokens"]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise a UserError unless so many tokens can be taken back."""
        if tokens_to_remove and self.is_initialized:
            raise UserError(
                f"{abs(tokens_to_remove)} tokens were to be taken back, but a retention state cannot forget; "
                "generate without an assistant or prompt lookup"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class SlidingLayer(DynamicSlidingWindowLayer):
    """The last window - 1 keys and values of one sliding slot.

    transformers' own layer keeps them as a slice, and so keeps all of a long prefill in memory until the next token comes; for
    a window of 1 it keeps all tokens for ever. This layer copies what it keeps.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Not the parent's: it copies the window's size to the device, which waits for a GPU, and where nothing reads it.
        DynamicLayer.lazy_initialization(self, key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        kept, total = self.sliding_window - 1, keys.shape[-2]
        if not self.record_past and (kept == 0 or total > 2 * self.sliding_window):
            self.keys, self.values = (x[..., total - min(kept, total) :, :].clone() for x in (keys, values))
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if self.is_initialized and not self._has_let_go:
            super().crop(tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise a UserError unless so many tokens can be taken back."""
        if tokens_to_remove and self.is_initialized and self._has_let_go:
            raise UserError(
                f"{abs(tokens_to_remove)} tokens were to be taken back, but the window has let go of those before them; "
                "call activate_past_recording() of the cache before they are added"
            )

    @property
    def _has_let_go(self) -> bool:
        return not self.record_past and self.cumulative_length >= self.sliding_window


class YocoUCache(Cache):
    """The caches of one batch of sequences.

    Layer i of the cache belongs to slot i of `Architecture.slots()`; the last layers hold the global KVs, if there are any.
    Only these and the layers of `full` stages grow with the number of tokens.

    Attributes:
        layout: what its layers follow from, by name; every call with it must be of a model, and a loop count, with the same.
        mask: false where a token in it is padding, (batch, tokens); None if none is known to be.
        packed: whether its rows hold more than one document, as far as is known.
    """

    def __init__(self, architecture: Architecture) -> None:
        layers: list[CacheLayerMixin] = []
        for slot in architecture.slots():
            if slot.attention == "sliding":
                assert architecture.window is not None
                layers.append(SlidingLayer(architecture.window))
            elif slot.attention == "full":
                layers.append(DynamicLayer())
            elif slot.attention == "retention":
                layers.append(RetentionLayer())
        if architecture.has_global_kv:
            layers += [DynamicLayer() for _ in range(architecture.global_kvs)]
        super().__init__(layers=layers)
        self.layout = _layout(architecture)
        self.mask: Tensor | None = None
        self.packed = False

    def note_rows(self, mask: Tensor | None, packed: bool) -> None:
        """Note what rows hold whose tokens are to be appended: `mask` is that of all tokens so far."""
        self.mask, self.packed = mask, packed or (self.get_seq_length() > 0 and self.packed)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back, as of `Cache`: from all layers, or from none if one cannot.

        Raises:
            UserError: if a layer cannot.
        """
        for layer in self.layers:
            if isinstance(layer, (RetentionLayer, SlidingLayer)):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, beam_idx.to(self.mask.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.mask is not None:
            self.mask = self.mask[indices]

    def append(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and return all that the new tokens may see.

        All tensors are (batch, tokens, kv_heads, head_dim).
        """
        keys, values = self.update(k.transpose(1, 2), v.transpose(1, 2), slot)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def retention_state(self, slot: int) -> Tensor | None:
        return self.layers[slot].keys

    def set_retention_state(self, slot: int, state: Tensor, tokens: int) -> None:
        self.update(state, torch.empty(state.shape[0], 0, device=state.device), slot, tokens=tokens)


def _layout(architecture: Architecture) -> dict[str, Any]:
    return {
        "loops per stage": tuple(stage.loops for stage in architecture.stages),
        "stages": tuple((stage.attention, stage.layers) for stage in architecture.stages),
        "window": architecture.window,
        "global_kvs": architecture.global_kvs,
        "num_key_value_heads": architecture.num_key_value_heads,
        "head_dim": architecture.head_dim,
    }


def check_unfilled(cache: YocoUCache | None) -> None:
    """Refuse a filled cache in a pass whose blocks run again, which would remember everything twice.

    Raises:
        UserError: if there is one.
    """
    if cache is not None and cache.get_seq_length():
        raise UserError(
            "past_key_values is filled, but gradient checkpointing runs blocks again, which a cache cannot take; call the "
            "model under torch.no_grad(), or in evaluation mode"
        )


def check_exit(loop: int | None, architecture: Architecture, cached: bool, recorded: bool) -> None:
    """Refuse an exit behind a loop where its second pass through what follows the loop would be taken for more of the first.

    Args:
        loop: counted from 1; None for no exit.
        architecture: at the loop count of the call.
        cached: whether the call asks for a cache, which would remember both passes.
        recorded: whether it asks for the hidden states of each layer, which would be those of both.

    Raises:
        UserError: if the exit is not possible; the message says why.
    """
    if loop is None:
        return
    if not 1 <= loop < architecture.num_loops:
        raise UserError(f"exit_loop is {loop}; expected a loop before the last, which is {architecture.num_loops}")
    if not architecture.can_exit_early:
        found = ", ".join(stage.in_words for stage in architecture.stages)
        found += " on parallel streams" if architecture.parallel else ""
        raise UserError(f"exit_loop needs one looped stage, which is not cross, without parallel streams; found {found}")
    if cached:
        raise UserError(f"exit_loop is {loop}, which goes with no cache; leave out past_key_values and use_cache")
    if recorded:
        raise UserError(f"exit_loop is {loop}, which goes without output_hidden_states; run a pass for each")


def check_cache(cache: YocoUCache | None, architecture: Architecture, rows: int, packing_arguments: list[str]) -> None:
    """Refuse a cache that does not fit a call.

    Args:
        architecture: at the loop count of this call.
        rows: number of rows of this call.
        packing_arguments: names of the arguments that say where documents begin.

    Raises:
        UserError: if it does not fit; the message says why.
    """
    if cache is None:
        return
    if not isinstance(cache, YocoUCache):
        raise UserError(f"past_key_values is a {type(cache).__name__}; expected a YocoUCache, or None to have one made")
    for name, asked in _layout(architecture).items():
        if cache.layout[name] != asked:
            raise UserError(
                f"the cache was made for {name} {cache.layout[name]}, this call has {asked}; "
                "use one cache per model and num_loops"
            )
    if cache.get_seq_length() == 0:
        return
    if (filled := cache.layers[0].keys.shape[0]) != rows:
        raise UserError(f"the cache holds a batch of {filled}; expected {rows}, one row for each row of this call")
    if packing_arguments:
        raise UserError(f"{packing_arguments[0]} came with a filled cache; packed documents are for calls without one")
    if cache.packed:
        raise UserError("the cache holds packed documents, none of which can go on from it; run each document alone")
