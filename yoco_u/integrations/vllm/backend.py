"""The plugin's attention backend: it leads from a slot to the `Attention` layer of vLLM that attends there.

vLLM itself knows the batch: which sequence a token belongs to, block tables, masks. What is left for this backend are the
layers by slot and the rotary angles. The tokens of all sequences are one row, (1, tokens, heads, head_dim), as in the engine.

A forward pass has three pieces: the graph of the self-decoder, a piece that is not compiled, and the graph of the cross-decoder
(`decoders.py`, `model.py`). A compiled graph takes tensors, not backends, so each piece makes a backend of its own, and
torch.compile traces through those that are made inside a graph. This is why three methods are narrower than in other backends:

- `global_kvs` and `kept` belong to the piece between the graphs. In a graph, the compiler would drop the write of a global KV,
  because nothing uses its result, and `kept` reads what vLLM sets anew for each step.
- `kept` fills its rows up to a number for which vLLM has a graph. The backend that it returns says in `sampled` how many of
  them are real, and has no rotary angles, because the cross-decoder computes those of its rows in its graph.
- `cross_attention` is given None as the global KV, which its layers find in the writer's cache. Keys and values would only be
  further inputs of the second graph, which it does not use.

Gated retention and ParScale's prefixes have no cache in vLLM; `support.py` refuses such models before any layer is built.
"""

from collections.abc import Sequence

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

from yoco_u.integrations.vllm.attention import AttentionLayers
from yoco_u.model.backend import AttentionBackend
from yoco_u.model.rope import rotate


class VllmBackend(AttentionBackend):
    """`AttentionBackend` of one piece of a forward pass in vLLM.

    Args:
        layers: the attention layers of the whole model.
        rotary: cos and sin of the tokens' positions, (1, tokens, 1, head_dim), float32; None between the graphs, where nothing
            is rotated.
        sampled: how many of the tokens are real; None for all. The tokens behind them only fill up a graph.
    """

    has_cache = True

    def __init__(
        self, layers: AttentionLayers, rotary: tuple[Tensor, Tensor] | None = None, sampled: int | None = None
    ) -> None:
        self.layers, self.rotary, self.sampled = layers, rotary, sampled

    def in_loop(self, loop: int) -> "tuple[None, VllmBackend]":
        """All tokens, since vLLM runs all requests with the same loop count."""
        return None, self

    def kept(self) -> "tuple[Tensor | None, VllmBackend]":
        """With fast prefill the rows that are sampled from, filled up by repeating the last one; all rows without it."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM runs the model without requests, to measure memory or to capture graphs
            return None, self
        reader = metadata[self.layers.by_slot[-1].layer_name]
        rows = getattr(reader, "logits_indices_padded", None)
        if rows is None:
            return None, self
        return rows, VllmBackend(self.layers, sampled=reader.num_logits_indices)

    def rotate(self, x: Tensor) -> Tensor:
        assert self.rotary is not None
        return rotate(x, self.rotary)

    def sliding_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(slot, q, k[0], v[0])

    def full_attention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        assert prefix is None
        return self._attend(slot, q, k[0], v[0])

    def global_kvs(self, new: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        for writer, (k, v) in zip(self.layers.writers, new, strict=True):
            unified_kv_cache_update(k[0], v[0], writer.layer_name)
        return new

    def cross_attention(self, slot: int, q: Tensor, global_kv: tuple[Tensor, Tensor] | None) -> Tensor:
        return self._attend(slot, q, None, None)

    def retention(self, slot: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        raise NotImplementedError("the vLLM plugin has no cache for gated retention")

    def _attend(self, slot: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """vLLM's layer stores new keys and values, (tokens, kv_heads, head_dim), and attends to what its window reaches."""
        return self.layers.by_slot[slot](q[0], k, v).view(q.shape)
