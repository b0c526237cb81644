"""vLLM's `Attention` layers of a model: one for each slot, and one that owns each global KV.

An `Attention` of vLLM is both a cache and the call that attends to it. It registers itself under its name while it is built.
vLLM expects two things of that register:

- The name of each holds exactly one number, and no two hold the same.
- The readers of global KVs are built last. With fast prefill, vLLM takes the layers from the end of the register up to the
  first that owns a cache for those that need not see a prompt.
"""

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention

from yoco_u.architecture import Architecture
from yoco_u.errors import UserError


class AttentionLayers(nn.Module):
    """All attention layers of one model.

    Attributes:
        by_slot: the layer of each slot, in the order of `Architecture.slots()`. Those of cross slots own no cache and read the
            writers'.
        writers: the layers that own the global KVs and never attend. Their numbers follow all slots.

    Raises:
        UserError: if the attention backend that vLLM chose cannot run the model.
    """

    def __init__(self, a: Architecture, vllm_config: VllmConfig) -> None:
        super().__init__()
        slots = a.slots()
        layers = [
            _attention(a, vllm_config, number, a.window if slot.attention == "sliding" else None)
            for number, slot in enumerate(slots)
            if slot.has_cache
        ]
        count = a.global_kvs if a.has_global_kv else 0
        writers = [_attention(a, vllm_config, len(slots) + number) for number in range(count)]
        for number in range(len(layers), len(slots)):  # cross slots are behind all others
            slot = slots[number]
            writer = writers[a.global_kv_of(slot.stage, slot.layer)]
            layers.append(_attention(a, vllm_config, number, reads=writer.layer_name))
        self.writers = nn.ModuleList(writers)
        self.by_slot = nn.ModuleList(layers)


def heads_of_rank(a: Architecture) -> tuple[int, int]:
    """Query heads of one rank, and its key and value heads, which repeat where there are more ranks than heads."""
    ranks = get_tensor_model_parallel_world_size()
    return a.num_attention_heads // ranks, max(1, a.num_key_value_heads // ranks)


def _attention(
    a: Architecture, vllm_config: VllmConfig, number: int, window: int | None = None, reads: str | None = None
) -> Attention:
    """One attention layer.

    Args:
        number: makes the name unique.
        window: keys that a token sees, itself included; None for all.
        reads: name of the layer whose cache this one reads instead of owning one.
    """
    heads, kv_heads = heads_of_rank(a)
    made = Attention(
        heads,
        a.head_dim,
        a.head_dim**-0.5,
        num_kv_heads=kv_heads,
        cache_config=vllm_config.cache_config,
        per_layer_sliding_window=window,
        prefix=f"slots.{number}.attn",
        kv_sharing_target_layer_name=reads,
    )
    backend = made.attn_backend
    if not backend.supports_head_size(a.head_dim):
        sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
        raise UserError(f"head_dim is {a.head_dim}; vLLM's attention backend {backend.get_name()} takes {sizes}")
    if backend.forward_includes_kv_cache_update:
        raise UserError(
            f"vLLM's attention backend {backend.get_name()} writes caches only while it attends, but the global KV's owner "
            "never does; choose another with --attention-backend"
        )
    return made
