"""Prepacking: replaces a model's layers by ones whose weights are laid out once for the CPU kernels.

With prepacked weights, products run close to the memory's rate for one token and close to the rate of large matrix products for
a chunk of a prompt (`yoco-u bench`); torch's own layout reaches neither for a few tokens. The operations between the products
become one pass over memory each, and whole blocks one call in a step of decodes. Results are the same up to the order of sums.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from yoco_u.architecture import Architecture
from yoco_u.inference.kernels.cpu import compiled
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.backend import AttentionBackend
from yoco_u.model.blocks import Block, CrossAttention, GatedRetention, GlobalKVProjection, LoopedStack, SelfAttention
from yoco_u.model.feed_forward import SwiGLU
from yoco_u.model.layers import JointLinear, RMSNorm
from yoco_u.model.quantization import is_int8

BLOCK = 64
"""How many outputs the kernel computes together."""


class PrepackedLinear(JointLinear):
    """Linear layers without bias, run as one product by `kernels/cpu/prepacked_linear.cpp`. Inputs are bfloat16.

    Args:
        weights: weight of each layer, (outputs, inputs), bfloat16 or from `quantize`; a copy is kept, so they can be freed.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        values = [weight.qdata if is_int8(weight) else weight.detach() for weight in weights]
        super().__init__([len(value) for value in values])
        self.prepacked = prepacked(values[0] if len(values) == 1 else torch.cat(values))
        self.scales: Tensor | None = None
        if is_int8(weights[0]):
            scales = torch.cat([weight.scale.flatten().float() for weight in weights])
            self.scales = pad(scales, (0, -len(scales) % BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.yoco_u.prepacked_linear(x, self.prepacked, self.scales, sum(self.sizes))


class PrepackedEmbedding(nn.Module):
    """A tied embedding, which reads its rows from the prepacked weights of the LM head.

    Args:
        head: the LM head, in bfloat16.
        width: width of a row, the hidden size.
    """

    def __init__(self, head: PrepackedLinear, width: int) -> None:
        super().__init__()
        self.prepacked, self.width = head.prepacked, width

    def forward(self, ids: Tensor) -> Tensor:
        return self.prepacked[ids // BLOCK, :, ids % BLOCK].flatten(-2)[..., : self.width]


def prepacked(weight: Tensor) -> Tensor:
    """Lay out a weight for the kernel: (outputs, inputs) -> (blocks, pairs of inputs, 64, 2), padded with zeros."""
    outputs, inputs = weight.shape
    filled = pad(weight, (0, inputs % 2, 0, -outputs % BLOCK))
    return filled.view(-1, BLOCK, filled.shape[1] // 2, 2).transpose(1, 2).contiguous()


class OnePassRMSNorm(nn.Module):
    """`RMSNorm` as one kernel, with one pass over memory."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.yoco_u.rms_norm(x, self.weight, self.eps)


class OnePassSwiGLU(nn.Module):
    """`SwiGLU` with prepacked weights and its activation as one kernel."""

    def __init__(self, layer: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = layer.gate_proj, layer.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.ops.yoco_u.swiglu(self.gate_up(x)))


class FusedDecodeBlock(nn.Module):
    """A prepacked `Block` that runs as one call of the kernels in a step of decodes, and operation by operation otherwise."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        attn, mlp = block.attn, block.mlp
        assert isinstance(attn, SelfAttention | CrossAttention) and isinstance(mlp, OnePassSwiGLU)
        cross = isinstance(attn, CrossAttention)
        linears: list[Any] = [attn.q_proj, attn.o_proj, mlp.gate_up, mlp.down]
        norms: list[Any] = [block.attn_norm, block.mlp_norm, attn.q_norm, None if cross else attn.k_norm]
        queries, keys = [*linears[0].sizes, 0][:2]
        self.kernel = torch.classes.yoco_u.DecodeBlock(
            [norm.weight for norm in norms if norm is not None],
            block.attn_norm.eps,
            [linear.prepacked for linear in linears],
            [linear.scales for linear in linears if linear.scales is not None],
            [sum(linear.sizes) for linear in linears],
            queries // attn.head_dim,
            keys // attn.head_dim,
            attn.head_dim,
            attn.rope if cross else True,
        )

    @staticmethod
    def can_run(block: nn.Module) -> TypeGuard[Block]:
        """Whether the kernel exists for this block: softmax attention without biases or prefixes, and a prepacked SwiGLU."""
        match block:
            case Block(
                attn=SelfAttention(has_prefix=False, has_bias=False) | CrossAttention(has_bias=False), mlp=OnePassSwiGLU()
            ):
                return True
        return False

    def forward(
        self, x: Tensor, backend: AttentionBackend, slot: int, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        arguments = backend.decode_block_arguments(slot)
        if arguments is None:
            return self.block(x, backend, slot, keys, values)
        return self.kernel.run(x, *arguments), None

    def remember(self, x: Tensor, backend: AttentionBackend, slot: int) -> None:
        """See `Block.remember`."""
        self.block.remember(x, backend, slot)


def runs_in_kernels(a: Architecture, device: torch.device) -> bool:
    """Whether the kernels run all large products of a model, bfloat16 on any CPU they are built for. Experts are torch's."""
    return device.type == "cpu" and a.experts is None and compiled()


def can_prepack(model: YocoUForCausalLM) -> bool:
    """Whether the kernels can run this model: it is bfloat16 and on a CPU, and they could be built."""
    return model.device.type == "cpu" and model.dtype == torch.bfloat16 and compiled()


@torch.no_grad()
def prepack(model: YocoUForCausalLM) -> None:
    """Replace the layers of a model in place. Afterwards it can only run forward: it has no gradients."""
    embedding = model.get_input_embeddings()
    tied = model.lm_head.weight is embedding.weight
    for module in list(model.modules()):
        for names in linear_layers(module):
            joint = PrepackedLinear([getattr(module, name).weight for name in names])
            for name in names:
                setattr(module, name, joint)
    if tied:
        head = model.get_submodule("lm_head")
        assert isinstance(head, PrepackedLinear)
        model.model.register_module("embed_tokens", PrepackedEmbedding(head, embedding.embedding_dim))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is RMSNorm:  # not one of several groups
                setattr(parent, name, OnePassRMSNorm(child))
            elif isinstance(child, SwiGLU):
                setattr(parent, name, OnePassSwiGLU(child))
    for stack in [module for module in model.modules() if isinstance(module, LoopedStack)]:
        stack.layers = nn.ModuleList(FusedDecodeBlock(b) if FusedDecodeBlock.can_run(b) else b for b in stack.layers)


def linear_layers(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of a module's own linear layers, in groups of layers that have the same input and so become one product."""
    together: tuple[str, ...] = ()
    match module:
        case SelfAttention() | GatedRetention():
            together = ("q_proj", "k_proj", "v_proj")
        case GlobalKVProjection():
            together = ("k_proj", "v_proj")
        case SwiGLU():
            together = ("gate_proj", "up_proj")
    alone = [(name,) for name, child in module.named_children() if isinstance(child, nn.Linear) and name not in together]
    alone = [names for names in alone if names != ("router",)]  # the router computes in float32
    groups: list[tuple[str, ...]] = [together] if together else []
    return [*groups, *alone]
