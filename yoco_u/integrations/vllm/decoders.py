"""The two parts of the model that vLLM compiles, each into a graph of its own: the self-decoder and the cross-decoder.

The self-decoder writes every cache but one, and the cross-decoder only reads. Between the two graphs the global keys and values
are written, because inside of a graph the compiler would drop the write, whose result nothing uses.
"""

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from yoco_u.architecture import Architecture
from yoco_u.integrations.vllm.attention import AttentionLayers
from yoco_u.integrations.vllm.backend import VllmBackend
from yoco_u.integrations.vllm.blocks import GlobalKVProjection, LoopedStack
from yoco_u.model.rope import rotary_angles


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class SelfDecoder(nn.Module):
    """The embedding, all stages that write caches, and then the global keys and values or, without cross stages, the norm.

    Args:
        architecture: at the loop count that is run.
        gates: how many loop gates each stage has in the checkpoint.
        attention: the attention layers of the whole model.
    """

    def __init__(self, *, architecture: Architecture, gates: list[int], attention: AttentionLayers) -> None:
        super().__init__()
        a = architecture
        self.rope, self.attention = (a.head_dim, a.rope_theta, a.rotary_scaling), attention
        self.embed_tokens = VocabParallelEmbedding(a.vocab_size, a.hidden_size)
        self.stages = _stages(a, gates, cross=False)
        self.global_kv = GlobalKVProjection(a) if a.has_global_kv else None
        self.norm = None if a.has_global_kv else RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The final hidden states, (tokens, hidden), of a model without cross stages.

        With cross stages, the hidden states before them, and the keys and values of each global KV, each (1, tokens, kv_heads,
        head_dim).
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        backend = VllmBackend(self.attention, rotary_angles(positions[None], *self.rope))
        for stage in self.stages.values():
            x = stage(x, backend)
        if self.global_kv is not None:
            return (x, *(one for pair in self.global_kv(x, backend) for one in pair))
        assert self.norm is not None
        return self.norm(x)


@support_torch_compile(dynamic_arg_dims={"x": 0, "positions": 0})
class CrossDecoder(nn.Module):
    """The cross stages and the final norm. The arguments are those of `SelfDecoder`."""

    def __init__(self, *, architecture: Architecture, gates: list[int], attention: AttentionLayers) -> None:
        super().__init__()
        a = architecture
        self.rope, self.attention = (a.head_dim, a.rope_theta, a.rotary_scaling), attention
        self.stages = _stages(a, gates, cross=True)
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(tokens, hidden) -> the final hidden states of the same tokens."""
        backend = VllmBackend(self.attention, rotary_angles(positions[None], *self.rope))
        for stage in self.stages.values():
            x = stage(x, backend)
        return self.norm(x)


def _stages(a: Architecture, gates: list[int], cross: bool) -> nn.ModuleDict:
    """The stages of one part, by their number in the checkpoint."""
    return nn.ModuleDict(
        {
            str(index): LoopedStack(a, index, gates[index])
            for index, stage in enumerate(a.stages)
            if (stage.attention == "cross") == cross
        }
    )
