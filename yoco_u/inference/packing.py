"""A model rebuilt for the CPU: weights laid out once for its matrix products, what lies between them in one pass each.

Packed weights come near the machine's memory rate for one token and its GEMM rate for a chunk of a prompt (`yoco-u bench`); the
plain layout, for one token, does not. The numbers are the same up to the order of sums.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from yoco_u.inference.batch import StepSequences
from yoco_u.inference.kernels import compiled
from yoco_u.inference.quantization import Int8Linear, is_int8
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.blocks import Block, CrossAttention, GatedRetention, GlobalKVProjection, LoopedStack, SelfAttention
from yoco_u.model.feed_forward import SwiGLU
from yoco_u.model.layers import JointLinear, RMSNorm
from yoco_u.model.sequences import Sequences


class PackedLinear(JointLinear):
    """Linear layers without bias in oneDNN's packed layout, run as one product.

    Args:
        weights: (outputs, inputs) of each layer; not needed afterwards.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__([len(weight) for weight in weights])
        joint = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(joint.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class TiedLinear(nn.Module):
    """An LM head whose weights are the embedding's as well, and so stay as they are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.yoco_u.linear(x, self.weight)


class OnePassRMSNorm(nn.Module):
    """`RMSNorm` in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.yoco_u.rms_norm(x, self.weight, self.eps)


class OnePassSwiGLU(nn.Module):
    """`SwiGLU` over packed weights, its activation in one pass."""

    def __init__(self, layer: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = layer.gate_proj, layer.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.ops.yoco_u.swiglu(self.gate_up(x)))


class OneCallBlock(nn.Module):
    """A packed `Block` that is one call of the kernels where every token continues a sequence of its own."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        attn, mlp = block.attn, block.mlp
        assert isinstance(attn, SelfAttention | CrossAttention) and isinstance(mlp, OnePassSwiGLU)
        cross = isinstance(attn, CrossAttention)
        self.kind = "cross" if cross else "sliding" if attn.sliding else "full"
        linears: list[Any] = [attn.q_proj, attn.o_proj, mlp.gate_up, mlp.down]
        norms: list[Any] = [block.attn_norm, block.mlp_norm, attn.q_norm, None if cross else attn.k_norm]
        queries, keys = [*linears[0].sizes, 0][:2]
        self.kernel = torch.classes.yoco_u.DecodeBlock(
            [norm.weight for norm in norms if norm is not None],
            block.attn_norm.eps,
            [linear.packed for linear in linears],
            [linear.scales for linear in linears if isinstance(linear, Int8Linear)],
            [sum(linear.sizes) for linear in linears],
            queries // attn.head_dim,
            keys // attn.head_dim,
            attn.head_dim,
            attn.rope if cross else True,
        )

    @staticmethod
    def can_run(block: nn.Module) -> TypeGuard[Block]:
        match block:
            case Block(attn=SelfAttention(has_prefix=False) | CrossAttention(), mlp=OnePassSwiGLU()):
                return True
        return False

    def forward(
        self, x: Tensor, sequences: Sequences, slot: int, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        step = sequences.of_single_tokens(self.kind, slot) if isinstance(sequences, StepSequences) else None
        return self.block(x, sequences, slot, keys, values) if step is None else (self.kernel.run(x, *step), None)


def can_pack(model: YocoUForCausalLM) -> bool:
    """Whether a packed layout exists for this model: bfloat16 on a CPU, and for int8 weights the kernel."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    if is_int8(model.lm_head.weight):
        return compiled()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def pack(model: YocoUForCausalLM) -> None:
    """Replace every linear layer of a model in place; it can only run forward from then on."""
    if model.lm_head.weight is model.get_input_embeddings().weight and compiled():
        model.register_module("lm_head", TiedLinear(model.lm_head))
    for module in list(model.modules()):
        for names in linear_layers(module):
            layers = [getattr(module, name) for name in names]
            weights = [layer.weight for layer in layers]
            joint = Int8Linear(weights) if is_int8(weights[0]) else PackedLinear(weights)
            for name in names:
                setattr(module, name, joint)
    if compiled():
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, RMSNorm):
                    setattr(parent, name, OnePassRMSNorm(child))
                elif isinstance(child, SwiGLU):
                    setattr(parent, name, OnePassSwiGLU(child))
        for stack in [module for module in model.modules() if isinstance(module, LoopedStack)]:
            stack.layers = nn.ModuleList(OneCallBlock(b) if OneCallBlock.can_run(b) else b for b in stack.layers)


def linear_layers(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of a module's own linear layers, those of the same input together."""
    together: tuple[str, ...] = ()
    match module:
        case SelfAttention() | GatedRetention():
            together = ("q_proj", "k_proj", "v_proj")
        case GlobalKVProjection():
            together = ("k_proj", "v_proj")
        case SwiGLU():
            together = ("gate_proj", "up_proj")
    alone = [(name,) for name, child in module.named_children() if isinstance(child, nn.Linear) and name not in together]
    alone = [names for names in alone if names != ("router",)]  # float32
    groups: list[tuple[str, ...]] = [together] if together else []
    return [*groups, *alone]
