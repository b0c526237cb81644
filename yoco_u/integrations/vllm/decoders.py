"""The two parts that vLLM compiles, each a graph of its own: what writes caches, and what only reads the global one.

Between them the global keys and values are written, outside of both graphs: inside, where nothing uses the result, the
compiler would drop the write.
"""

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from yoco_u.architecture import Architecture, Stage
from yoco_u.integrations.vllm.layers import GlobalKVProjection, LoopedStack
from yoco_u.model.rope import rotary_angles


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class SelfDecoder(nn.Module):
    """The embedding, all stages that write caches, and then the global keys and values or, without cross stages, the norm.

    Args:
        architecture: as it is run.
        gates: how many each stage has in the checkpoint.
    """

    def __init__(self, *, vllm_config: VllmConfig, architecture: Architecture, gates: list[int]) -> None:
        super().__init__()
        a = architecture
        self.head_dim, self.theta = a.head_dim, a.rope_theta
        self.embed_tokens = VocabParallelEmbedding(a.vocab_size, a.hidden_size)
        self.stages, self.slots = _stages(a, False, gates, 0, None, vllm_config)
        self.global_kv = None
        if a.has_global_kv:
            self.global_kv = GlobalKVProjection(a, self.slots, vllm_config)
            self.slots += 1
        self.norm = None if a.has_global_kv else RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The final hidden states, (tokens, hidden); or those before the cross-decoder, and the global keys and values."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = rotary_angles(positions, self.head_dim, self.theta)
        for stage in self.stages.values():
            x = stage(x, rotary)
        if self.global_kv is not None:
            return (x, *self.global_kv(x, rotary))
        assert self.norm is not None
        return self.norm(x)


@support_torch_compile(dynamic_arg_dims={"x": 0, "positions": 0})
class CrossDecoder(nn.Module):
    """The cross stages and the final norm.

    Args:
        writer: name of the attention that owns the global KV.
        first_slot: number of this part's first attention; vLLM wants readers to come last.
    """

    def __init__(
        self, *, vllm_config: VllmConfig, architecture: Architecture, gates: list[int], first_slot: int, writer: str
    ) -> None:
        super().__init__()
        a = architecture
        self.head_dim, self.theta = a.head_dim, a.rope_theta
        self.stages, _ = _stages(a, True, gates, first_slot, writer, vllm_config)
        self.reader = next(module.layer_name for module in self.modules() if isinstance(module, Attention))
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        rotary = rotary_angles(positions, self.head_dim, self.theta)
        for stage in self.stages.values():
            x = stage(x, rotary)
        return self.norm(x)


def _stages(
    a: Architecture, cross: bool, gates: list[int], slot: int, writer: str | None, vllm_config: VllmConfig
) -> tuple[nn.ModuleDict, int]:
    """The stages of one part by their number in the checkpoint, and the slot after theirs."""
    stages = nn.ModuleDict()
    for number, stage in enumerate(a.stages):
        if (stage.attention == "cross") == cross:
            stages[str(number)] = LoopedStack(a, stage, gates[number], slot, writer, vllm_config)
            slot += stage.layers * _caches(stage)
    return stages, slot


def _caches(stage: Stage) -> int:
    """Attentions of one block of a stage."""
    return 1 if stage.attention == "cross" else stage.loops
