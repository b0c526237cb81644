"""The blocks of `yoco_u.model.blocks` on vLLM's layers: attention, SwiGLU, and the stack that loops them.

Hidden states are (tokens, hidden): the tokens of all sequences lie one after the other. Linear layers are split over the ranks
of tensor parallelism, so the heads that a block computes are those of one rank.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from yoco_u.architecture import Architecture, Attention
from yoco_u.integrations.vllm.attention import heads_of_rank
from yoco_u.integrations.vllm.backend import VllmBackend
from yoco_u.integrations.vllm.experts import ExpertMixture


class SelfAttention(nn.Module):
    """Full or sliding causal attention with RoPE and grouped key and value heads."""

    def __init__(self, a: Architecture, kind: Attention) -> None:
        super().__init__()
        self.sliding, self.head_dim = kind == "sliding", a.head_dim
        heads, kv_heads = heads_of_rank(a)
        self.sizes = [heads * a.head_dim, kv_heads * a.head_dim, kv_heads * a.head_dim]
        self.qkv_proj = QKVParallelLinear(
            a.hidden_size, a.head_dim, a.num_attention_heads, a.num_key_value_heads, bias=a.attention_bias, return_bias=False
        )
        self.o_proj = RowParallelLinear(a.num_attention_heads * a.head_dim, a.hidden_size, bias=False, return_bias=False)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None

    def forward(self, x: Tensor, backend: VllmBackend, slot: int) -> Tensor:
        q, k, v = (_heads(y, self.head_dim) for y in self.qkv_proj(x).split(self.sizes, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = backend.rotate(q), backend.rotate(k)
        out = backend.sliding_attention(slot, q, k, v) if self.sliding else backend.full_attention(slot, q, k, v, None)
        return self.o_proj(out[0].flatten(-2))


class CrossAttention(nn.Module):
    """Queries of this layer against a global KV; keys and values are not projected here."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.head_dim, self.rope = a.head_dim, a.rope_cross
        width = a.num_attention_heads * a.head_dim
        self.q_proj = ColumnParallelLinear(a.hidden_size, width, bias=a.attention_bias, return_bias=False)
        self.o_proj = RowParallelLinear(width, a.hidden_size, bias=False, return_bias=False)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None

    def forward(self, x: Tensor, backend: VllmBackend, slot: int) -> Tensor:
        q = _heads(self.q_proj(x), self.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.rope:
            q = backend.rotate(q)
        return self.o_proj(backend.cross_attention(slot, q, None)[0].flatten(-2))


class GlobalKVProjection(nn.Module):
    """`K = RMSNorm(X) W_K`, `V = RMSNorm(X) W_V` from the self-decoder's output; `VllmBackend.global_kvs` writes them."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.head_dim, self.rope = a.head_dim, a.rope_cross
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        # vLLM's projections of queries, keys and values with no queries: they split or repeat the heads over the ranks.
        self.kv_projs = nn.ModuleList(
            QKVParallelLinear(a.hidden_size, a.head_dim, 0, a.num_key_value_heads, bias=a.attention_bias, return_bias=False)
            for _ in range(a.global_kvs)
        )
        self.k_norms = nn.ModuleList(RMSNorm(a.head_dim, a.rms_norm_eps) for _ in range(a.global_kvs if a.qk_norm else 0))

    def forward(self, x: Tensor, backend: VllmBackend) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the tokens for each global KV, (1, tokens, kv_heads, head_dim)."""
        x, found = self.norm(x), []
        for number, kv_proj in enumerate(self.kv_projs):
            k, v = (_heads(y, self.head_dim) for y in kv_proj(x).chunk(2, dim=-1))
            if self.k_norms:
                k = self.k_norms[number](k)
            found.append((backend.rotate(k) if self.rope else k, v))
        return found

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Divide the checkpoint's tensors, in which the global KVs lie one behind the other."""
        parameters, count, loaded = dict(self.named_parameters()), len(self.kv_projs), set()
        for name, tensor in weights:
            layer, kind = name.removesuffix(".weight"), "weight"
            if layer.endswith("_bias"):
                kind = "bias"
            places: list[tuple[str, Tensor, tuple[str, ...]]] = [(name, tensor, ())]
            if layer == "k_norm":
                places = [(f"k_norms.{n}.weight", part.flatten(), ()) for n, part in enumerate(tensor.view(count, -1))]
            elif layer != "norm":
                places = [(f"kv_projs.{n}.{kind}", part, (layer[0],)) for n, part in enumerate(tensor.chunk(count))]
            for own, part, shard in places:
                load = getattr(parameters[own], "weight_loader", default_weight_loader)
                load(parameters[own], part, *shard)
                loaded.add(own)
        return loaded


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)` (arXiv 2002.05202), without biases.

    Args:
        reduce_results: whether to add up the shares of the ranks. Shared experts do not, as the mixture adds up its own sum.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, reduce_results: bool = True) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, [intermediate_size] * 2, bias=False, return_bias=False)
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias=False, return_bias=False, reduce_results=reduce_results
        )
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class Block(nn.Module):
    """`Y = Attention(RMSNorm(X)) + X`, `X' = FeedForward(RMSNorm(Y)) + Y`.

    Args:
        name: a unique name for the feed-forward, since vLLM finds a mixture of experts by its name.
    """

    def __init__(self, a: Architecture, kind: Attention, name: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.attn: nn.Module = CrossAttention(a) if kind == "cross" else SelfAttention(a, kind)
        self.mlp_norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp: nn.Module
        if a.experts is None:
            self.mlp = SwiGLU(a.hidden_size, a.intermediate_size)
        else:
            width = a.experts.shared_experts * a.experts.intermediate_size
            shared = SwiGLU(a.hidden_size, width, reduce_results=False) if width else None
            self.mlp = ExpertMixture(a, f"{name}.experts", shared)

    def forward(self, x: Tensor, backend: VllmBackend, slot: int) -> Tensor:
        x = x + self.attn(self.attn_norm(x), backend, slot)
        return x + self.mlp(self.mlp_norm(x))


class LoopedStack(nn.Module):
    """The blocks of one stage, applied `loops` times with the same parameters.

    Gates, and the use of the last one for further loops, are as in `yoco_u.model.blocks.LoopedStack`.

    Args:
        a: the architecture at the loop count that is run.
        index: which of its stages this is.
        gates: how many loop gates the checkpoint has. It may have been trained with another loop count.

    Attributes:
        slots: the slots of each loop, one for each layer.
    """

    def __init__(self, a: Architecture, index: int, gates: int) -> None:
        super().__init__()
        stage = a.stages[index]
        numbered = list(enumerate(a.slots()))
        self.slots = [
            [number for number, slot in numbered if (slot.stage, slot.loop) == (index, loop)] for loop in range(stage.loops)
        ]
        self.layers = nn.ModuleList(Block(a, stage.attention, f"slots.{first}.mlp") for first in self.slots[0])
        self.loop_gates = nn.Parameter(torch.empty(gates), requires_grad=False) if gates else None

    def forward(self, x: Tensor, backend: VllmBackend) -> Tensor:
        for loop, slots in enumerate(self.slots):
            before = x
            for layer, slot in zip(self.layers, slots, strict=True):
                x = layer(x, backend, slot)
            if loop > 0 and self.loop_gates is not None:
                x = before + self.loop_gates[min(loop, len(self.loop_gates)) - 1] * (x - before)
        return x


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(tokens, heads * head_dim) -> (1, tokens, heads, head_dim), as backends take it."""
    return x.unflatten(-1, (-1, head_dim))[None]
