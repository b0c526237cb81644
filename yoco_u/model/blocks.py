"""The blocks of every kind of stage, and the stack of blocks that a looped stage applies several times."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from yoco_u.model.backend import AttentionBackend
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.feed_forward import feed_forward
from yoco_u.model.layers import Biased, GroupedRMSNorm, ResidualLinear, RMSNorm, project, without_autocast

GlobalKV = tuple[Tensor, Tensor]
"""The keys and values of one global KV, each (batch, tokens, kv_heads, head_dim)."""


class SelfAttention(Biased):
    """Full or sliding causal attention with RoPE and grouped key and value heads.

    Hidden states are (batch, tokens, hidden) or, with ParScale streams, (batch, tokens, streams, hidden). One attention call
    serves all streams: their heads lie side by side.
    """

    def __init__(self, config: YocoUConfig, kind: str) -> None:
        super().__init__()
        a = config.architecture
        self.sliding, self.head_dim = kind == "sliding", a.head_dim
        self.q_proj = nn.Linear(a.hidden_size, a.num_attention_heads * a.head_dim, bias=False)
        self.k_proj = nn.Linear(a.hidden_size, a.num_key_value_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.hidden_size, a.num_key_value_heads * a.head_dim, bias=False)
        self.o_proj = ResidualLinear(a.num_attention_heads * a.head_dim, a.hidden_size)
        if a.attention_bias:
            self.make_biases(q=self.q_proj, k=self.k_proj, v=self.v_proj)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        if a.parallel:
            prefix = (a.parallel.prefix_tokens, a.parallel.streams * a.num_key_value_heads, a.head_dim)
            self.prefix_keys = nn.Parameter(torch.empty(prefix))
            self.prefix_values = nn.Parameter(torch.empty(prefix))
        self.has_prefix = a.parallel is not None

    def forward(self, x: Tensor, backend: AttentionBackend, slot: int, global_kv: GlobalKV | None) -> Tensor:
        q, k, v = self._projected(x, backend)
        if self.sliding:
            out = backend.sliding_attention(slot, q, k, v)
        else:
            prefix = (self.prefix_keys, self.prefix_values) if self.has_prefix else None
            out = backend.full_attention(slot, q, k, v, prefix)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))

    def remember(self, x: Tensor, backend: AttentionBackend, slot: int) -> None:
        """Compute keys and values alone, of tokens that run no loop after that of `slot`, and let later loops have them."""
        _, k, v = self._projected(x, backend)
        backend.remember(slot, k, v)

    def _projected(self, x: Tensor, backend: AttentionBackend) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, rotated."""
        projected = self.biased("qkv", project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (_heads(y, self.head_dim) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return backend.rotate(q), backend.rotate(k), v


class GatedRetention(nn.Module):
    """Gated retention (arXiv 2405.05254, section 3): `W_O (swish(x W_G) * norm(retention))`, one decay per head and token."""

    TEMPERATURE = 16.0

    def __init__(self, config: YocoUConfig) -> None:
        super().__init__()
        a = config.architecture
        self.head_dim, self.groups, self.eps = a.head_dim, a.num_attention_heads // a.num_key_value_heads, a.rms_norm_eps
        self.q_proj = nn.Linear(a.hidden_size, a.num_attention_heads * a.head_dim, bias=False)
        self.k_proj = nn.Linear(a.hidden_size, a.num_key_value_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.hidden_size, a.num_key_value_heads * a.head_dim, bias=False)
        self.gate_proj = nn.Linear(a.hidden_size, a.num_attention_heads * a.head_dim, bias=False)
        self.decay_proj = nn.Linear(a.hidden_size, a.num_attention_heads, bias=False)
        self.o_proj = ResidualLinear(a.num_attention_heads * a.head_dim, a.hidden_size)

    def forward(self, x: Tensor, backend: AttentionBackend, slot: int, global_kv: GlobalKV | None) -> Tensor:
        q, k, v = (_heads(y, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        gate, decay = self.gate_proj(x), self.decay_proj(x)
        with without_autocast(x.device):
            q, k = backend.rotate(q.float()), backend.rotate(k.float()) * self.head_dim**-0.5
            k, v = (kv.repeat_interleave(self.groups, dim=2) for kv in (k, v.float()))
            log_decay = F.logsigmoid(decay.float()) / self.TEMPERATURE  # (batch, tokens, heads)
            out = backend.retention(slot, q, k, v, log_decay)
            out = F.rms_norm(out, (self.head_dim,), eps=self.eps).flatten(-2)
        return self.o_proj(F.silu(gate) * out.to(gate.dtype))


class CrossAttention(Biased):
    """Attention of this layer's own queries to a global KV; the layer projects no keys and values."""

    def __init__(self, config: YocoUConfig) -> None:
        super().__init__()
        a = config.architecture
        self.head_dim, self.rope = a.head_dim, a.rope_cross
        self.q_proj = nn.Linear(a.hidden_size, a.num_attention_heads * a.head_dim, bias=False)
        self.o_proj = ResidualLinear(a.num_attention_heads * a.head_dim, a.hidden_size)
        if a.attention_bias:
            self.make_biases(q=self.q_proj)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None

    def forward(self, x: Tensor, backend: AttentionBackend, slot: int, global_kv: GlobalKV | None) -> Tensor:
        assert global_kv is not None
        (q,) = self.biased("q", [self.q_proj(x)])
        q = _heads(q, self.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.rope:
            q = backend.rotate_cross(q)
        return self.o_proj(backend.cross_attention(slot, q, global_kv).flatten(-2))


class GlobalKVProjection(Biased):
    """The global KVs from the self-decoder's output X: `K = RMSNorm(X) W_K`, `V = RMSNorm(X) W_V`, once for all loops.

    The projections of several global KVs lie one behind the other in the rows of `k_proj` and of `v_proj`.
    """

    def __init__(self, config: YocoUConfig) -> None:
        super().__init__()
        a = config.architecture
        self.head_dim, self.kv_heads, self.rope = a.head_dim, a.num_key_value_heads, a.rope_cross
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.k_proj = nn.Linear(a.hidden_size, a.global_kvs * a.num_key_value_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.hidden_size, a.global_kvs * a.num_key_value_heads * a.head_dim, bias=False)
        if a.attention_bias:
            self.make_biases(k=self.k_proj, v=self.v_proj)
        size, eps = a.head_dim, a.rms_norm_eps
        norm = RMSNorm(size, eps) if a.global_kvs == 1 else GroupedRMSNorm(a.global_kvs, size, eps)
        self.k_norm = norm if a.qk_norm else None

    def forward(self, x: Tensor, backend: AttentionBackend) -> tuple[GlobalKV, ...]:
        x = self.norm(x)
        projected = self.biased("kv", project(x, self.k_proj, self.v_proj))
        k, v = (y.unflatten(-1, (-1, self.kv_heads, self.head_dim)) for y in projected)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rope:
            k = backend.rotate_cross(k.flatten(2, 3)).view_as(k)
        return tuple(zip(k.unbind(2), v.unbind(2), strict=True))


class Block(GradientCheckpointingLayer):
    """`Y = Attention(RMSNorm(X)) + X`, `X' = FeedForward(RMSNorm(Y)) + Y`."""

    def __init__(self, config: YocoUConfig, kind: str) -> None:
        super().__init__()
        a = config.architecture
        self.attn_norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.attn: nn.Module
        if kind == "cross":
            self.attn = CrossAttention(config)
        else:
            self.attn = GatedRetention(config) if kind == "retention" else SelfAttention(config, kind)
        self.mlp_norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = feed_forward(config)

    def forward(
        self, x: Tensor, backend: AttentionBackend, slot: int, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run attention and the feed-forward.

        Args:
            x: (batch, tokens, hidden), or (batch, tokens, streams, hidden).
            slot: index of this application of the block in `Architecture.slots()`; ignored by a backend without a cache.
            keys, values: the global KV that a cross block reads. They are two arguments because reentrant gradient
                checkpointing follows tensors, but not tuples of tensors.

        Returns:
            The new hidden states, and the auxiliary loss of a mixture of experts or None.
        """
        global_kv = (keys, values) if keys is not None and values is not None else None
        x = x + self.attn(self.attn_norm(x), backend, slot, global_kv)
        out = self.mlp(self.mlp_norm(x))
        out, loss = out if isinstance(out, tuple) else (out, None)  # not by the class of mlp: PEFT wraps a mixture of experts
        return x + out, loss

    def remember(self, x: Tensor, backend: AttentionBackend, slot: int) -> None:
        """Let the loops after that of `slot` have keys and values of tokens that run none of them, from their last states."""
        assert isinstance(self.attn, SelfAttention)
        self.attn.remember(self.attn_norm(x), backend, slot)


def blocks_of(module: nn.Module) -> Iterator[Block]:
    """The blocks in a model or a part of it, in their order."""
    return (block for block in module.modules() if isinstance(block, Block))


def recomputes(model: nn.Module) -> bool:
    """Whether a backward pass will run blocks of a model again, for gradient checkpointing."""
    return model.training and torch.is_grad_enabled() and any(block.gradient_checkpointing for block in blocks_of(model))


class LoopedStack(nn.Module):
    """The blocks of one stage, applied `loops` times with the same parameters.

    With gates, a learned scalar scales the change that each loop after the first makes: `h + g_t (f(h) - h)`. Loops beyond the
    loop count of the config use the last gate.

    Args:
        index: which of the architecture's stages this is.

    Attributes:
        backward_loops: how many of the last loops gradients go through in training; None for all. The loops before run without
            gradients; to what lies before the stage these pass by them, along the residual stream, as if they changed nothing.
    """

    def __init__(self, config: YocoUConfig, index: int) -> None:
        super().__init__()
        a = config.architecture
        stage = a.stages[index]
        self.reads = [a.global_kv_of(index, layer) if stage.attention == "cross" else None for layer in range(stage.layers)]
        self.layers = nn.ModuleList(Block(config, stage.attention) for _ in range(stage.layers))
        self.gate_init = stage.loop_gate
        self.loop_gates = nn.Parameter(torch.empty(stage.loops - 1)) if stage.loop_gate is not None else None
        self.backward_loops: int | None = None

    def forward(
        self,
        x: Tensor,
        backend: AttentionBackend,
        loops: int,
        first_slot: int = 0,
        global_kvs: Sequence[GlobalKV] = (),
        first_loop: int = 0,
        exits: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all loops, or those from `first_loop` on.

        Args:
            x: (batch, tokens, hidden), or (batch, tokens, streams, hidden).
            loops: loop count T of this call.
            first_slot: index of the stage's first slot in `Architecture.slots()`.
            global_kvs: for cross stages, what `AttentionBackend.global_kvs` returned.
            exits: each value becomes the hidden states after as many loops as its key says.

        Returns:
            The hidden states after the last loop, and the auxiliary losses of all blocks and loops.
        """
        losses, begin = [], x
        cut = loops - self.backward_loops if self.training and self.backward_loops is not None else 0
        for loop in range(first_loop, loops):
            tokens, in_loop = backend.in_loop(loop) if loops > 1 else (None, backend)
            if tokens is not None and len(tokens) == 0:  # none of the kept tokens needs another loop
                break
            before = x if tokens is None else x[:, tokens]
            with torch.no_grad() if loop < cut else nullcontext():
                out, loop_losses = self.run_loop(before, in_loop, loop, first_slot, global_kvs)
            losses += loop_losses
            after = out if tokens is None else x.index_copy(1, tokens, out)
            x, gone = backend.end_loop(loop, x, after) if loops > 1 else (after, None)
            if gone is not None:
                self._remember(x if gone[0] is None else x[:, gone[0]], gone[1], loop, first_slot)
            if exits and loop + 1 in exits:
                exits[loop + 1] = x
            if loop == cut - 1:
                x = x + (begin - begin.detach())  # along the residual stream, what lies before is trained too
        if self.training and loops == 1 and self.loop_gates is not None:
            x = x + 0 * self.loop_gates.sum()  # unused gates need a gradient, of zero: DDP waits for every parameter's
        return x, losses

    def run_loop(
        self, x: Tensor, backend: AttentionBackend, loop: int, first_slot: int = 0, global_kvs: Sequence[GlobalKV] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one loop, on the tokens that the backend stands for. Arguments and results as in `forward`."""
        losses, out = [], x
        for i, (layer, read) in enumerate(zip(self.layers, self.reads, strict=True)):
            slot = first_slot + loop * len(self.layers) + i if backend.has_cache else 0
            out = backend.hold(loop, x, out)
            out, loss = layer(out, backend, slot, *(() if read is None else global_kvs[read]))
            if loss is not None:
                losses.append(loss)
        if loop > 0 and self.loop_gates is not None:
            out = x + self.loop_gates[min(loop, len(self.loop_gates)) - 1] * (out - x)
        return out, losses

    def _remember(self, x: Tensor, backend: AttentionBackend, loop: int, first_slot: int) -> None:
        """Let the loops after this one have keys and values of tokens (batch, tokens, ...) that run none of them."""
        for i, (layer, read) in enumerate(zip(self.layers, self.reads, strict=True)):
            if read is None:
                layer.remember(x, backend, first_slot + loop * len(self.layers) + i)  # type: ignore[operator]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, tokens, [streams,] heads * head_dim) -> (batch, tokens, [streams *] heads, head_dim)"""
    return x.reshape(*x.shape[:2], -1, head_dim)
