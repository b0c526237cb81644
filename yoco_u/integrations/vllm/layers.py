"""The blocks on vLLM's layers: attention that owns, writes or reads a cache, SwiGLU, and the stack that loops them.

Hidden states are (tokens, hidden); the tokens of all sequences lie one after the other. Linear layers are split over the ranks
of tensor parallelism, so heads below are those of a rank.
"""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from yoco_u.architecture import Architecture, Stage
from yoco_u.errors import UserError
from yoco_u.integrations.vllm.experts import ExpertMixture
from yoco_u.model.rope import rotate

Rotary = tuple[Tensor, Tensor]
"""cos and sin of the tokens, (tokens, 1, head_dim), float32."""


def attention(
    a: Architecture, vllm_config: VllmConfig, slot: int, window: int | None = None, reads: str | None = None
) -> Attention:
    """One cache of vLLM's, or a reader of another's.

    Args:
        slot: makes the name unique; vLLM wants exactly one number in it.
        window: keys that a token sees, itself included; None for all.
        reads: name of the attention whose cache is read; then this one has none.

    Raises:
        UserError: if the attention backend that vLLM chose cannot do it.
    """
    heads, kv_heads = _heads(a)
    made = Attention(
        heads,
        a.head_dim,
        a.head_dim**-0.5,
        num_kv_heads=kv_heads,
        cache_config=vllm_config.cache_config,
        per_layer_sliding_window=window,
        prefix=f"slots.{slot}.attn",
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


class SelfAttention(nn.Module):
    """Full or sliding causal attention with RoPE: the weights once, a cache for each loop."""

    def __init__(self, a: Architecture, stage: Stage, slots: list[int], vllm_config: VllmConfig) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        self.sizes = [heads * a.head_dim for heads in (*_heads(a), _heads(a)[1])]
        self.qkv_proj = QKVParallelLinear(
            a.hidden_size, a.head_dim, a.num_attention_heads, a.num_key_value_heads, bias=False, return_bias=False
        )
        self.o_proj = RowParallelLinear(a.num_attention_heads * a.head_dim, a.hidden_size, bias=False, return_bias=False)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        window = a.window if stage.attention == "sliding" else None
        self.attention = nn.ModuleList(attention(a, vllm_config, slot, window) for slot in slots)

    def forward(self, x: Tensor, rotary: Rotary, loop: int) -> Tensor:
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        q, k = q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))  # (tokens, heads, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        return self.o_proj(self.attention[loop](q.flatten(-2), k.flatten(-2), v))


class CrossAttention(nn.Module):
    """Queries of this layer against the global KV; all loops read it through the same attention."""

    def __init__(self, a: Architecture, slot: int, writer: str, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.head_dim, self.rope = a.head_dim, a.rope_cross
        width = a.num_attention_heads * a.head_dim
        self.q_proj = ColumnParallelLinear(a.hidden_size, width, bias=False, return_bias=False)
        self.o_proj = RowParallelLinear(width, a.hidden_size, bias=False, return_bias=False)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        self.attention = attention(a, vllm_config, slot, reads=writer)

    def forward(self, x: Tensor, rotary: Rotary, loop: int) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.rope:
            q = rotate(q, rotary)
        return self.o_proj(self.attention(q.flatten(-2), None, None))


class GlobalKVProjection(nn.Module):
    """`K = RMSNorm(X) W_K`, `V = RMSNorm(X) W_V`, and the cache that they go to: a writer that never attends."""

    def __init__(self, a: Architecture, slot: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.head_dim, self.rope = a.head_dim, a.rope_cross
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        # A projection of no queries: keys and values are split or repeated over the ranks as everywhere.
        self.kv_proj = QKVParallelLinear(a.hidden_size, a.head_dim, 0, a.num_key_value_heads, bias=False, return_bias=False)
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        self.writer = attention(a, vllm_config, slot)

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens, each (tokens, kv_heads, head_dim)."""
        k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.kv_proj(self.norm(x)).chunk(2, dim=-1))
        if self.k_norm is not None:
            k = self.k_norm(k)
        return rotate(k, rotary) if self.rope else k, v


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`.

    Args:
        reduce_results: add up the ranks' shares; shared experts leave that to the mixture.
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
        slot: first of the numbers of this block's caches; each loop's is `layers` after the one before.
    """

    def __init__(self, a: Architecture, stage: Stage, slot: int, writer: str | None, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.attn: nn.Module
        if stage.attention == "cross":
            assert writer is not None
            self.attn = CrossAttention(a, slot, writer, vllm_config)
        else:
            slots = [slot + loop * stage.layers for loop in range(stage.loops)]
            self.attn = SelfAttention(a, stage, slots, vllm_config)
        self.mlp_norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp: nn.Module
        if a.experts is None:
            self.mlp = SwiGLU(a.hidden_size, a.intermediate_size)
        else:
            shared = a.experts.shared_experts * a.experts.intermediate_size
            self.mlp = ExpertMixture(
                a, f"slots.{slot}.mlp.experts", SwiGLU(a.hidden_size, shared, reduce_results=False) if shared else None
            )

    def forward(self, x: Tensor, rotary: Rotary, loop: int) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotary, loop)
        return x + self.mlp(self.mlp_norm(x))


class LoopedStack(nn.Module):
    """The blocks of one stage, applied `stage.loops` times; gates as in `yoco_u.model.blocks.LoopedStack`.

    Args:
        stage: as it is run.
        gates: how many the checkpoint has, which may have been trained with another loop count.
    """

    def __init__(
        self, a: Architecture, stage: Stage, gates: int, slot: int, writer: str | None, vllm_config: VllmConfig
    ) -> None:
        super().__init__()
        self.loops = stage.loops
        self.layers = nn.ModuleList(Block(a, stage, slot + i, writer, vllm_config) for i in range(stage.layers))
        self.loop_gates = nn.Parameter(torch.empty(gates), requires_grad=False) if gates else None
        self.gate_of_loop = [min(loop, gates) - 1 for loop in range(stage.loops)]

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        for loop in range(self.loops):
            before = x
            for layer in self.layers:
                x = layer(x, rotary, loop)
            if loop > 0 and self.loop_gates is not None:
                x = before + self.loop_gates[self.gate_of_loop[loop]] * (x - before)
        return x


def _heads(a: Architecture) -> tuple[int, int]:
    """Query heads, and key and value heads, of one rank; where there are more ranks than the latter, they repeat."""
    ranks = get_tensor_model_parallel_world_size()
    return a.num_attention_heads // ranks, max(1, a.num_key_value_heads // ranks)
