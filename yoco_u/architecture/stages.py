"""The architecture of a model: a list of stages, from which everything else follows.

A stage is a stack of blocks with one kind of attention, applied a number of times (its loops). The forward pass, the caches,
the cost and the tensor names are all derived from an `Architecture`. It is plain data, so nothing here needs torch.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from yoco_u.config import (
    Config,
    Count,
    Float32,
    Loops,
    Needs,
    NonNegativeFloat32,
    PositiveFloat32,
    shown,
    too_many_loops,
)
from yoco_u.errors import UserError

Attention = Literal["full", "sliding", "retention", "cross"]


class Stage(Config):
    """`layers` blocks of one kind of attention, applied `loops` times with the same parameters.

    Attributes:
        attention: `full` (causal, RoPE), `sliding` (causal, the last `window` keys, RoPE), `retention` (gated retention of
            YOCO 2024, RoPE) or `cross` (causal attention to the one global KV cache).
        layers: how many blocks, each with parameters of its own.
        loops: how often the whole stack is applied; the output of one loop is the input of the next.
        loop_gate: initial value of the learned scalars g_t that let the change of every loop after the first in:
            `h + g_t (f(h) - h)`. None for no gates, as in the paper's models.
    """

    attention: Attention
    layers: Count
    loops: Loops = 1
    loop_gate: Float32 | None = None

    @model_validator(mode="after")
    def _gate_needs_loops(self) -> "Stage":
        if self.loop_gate is not None and self.loops == 1:
            raise ValueError("loop_gate gates the loops after the first, but loops is 1; set loops >= 2 or drop loop_gate")
        return self

    @property
    def in_words(self) -> str:
        """Layers, attention and loops, such as `3 sliding x3 gated`."""
        loops = f" x{self.loops}" if self.loops > 1 else ""
        return f"{self.layers} {self.attention}{loops}{' gated' if self.loop_gate is not None else ''}"


class MixtureOfExperts(Config):
    """Fine-grained mixture of experts in place of each block's SwiGLU; the paper's 10B model has the defaults.

    Attributes:
        num_experts: routed SwiGLU experts per block.
        experts_per_token: routed experts that each token visits; no token is ever dropped.
        shared_experts: further experts, which every token visits.
        intermediate_size: inner width of one expert.
        auxiliary_loss_weight: weight of the load-balancing loss; 0 turns it off.
        bias_update_rate: step of the auxiliary-loss-free balancing bias; 0 turns it off.
    """

    num_experts: Count = 64
    experts_per_token: Count = 8
    shared_experts: int = Field(default=1, ge=0, lt=2**31)
    intermediate_size: Count
    auxiliary_loss_weight: NonNegativeFloat32 = 0.0
    bias_update_rate: NonNegativeFloat32 = 1e-3

    @model_validator(mode="after")
    def _enough_experts(self) -> "MixtureOfExperts":
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token} but there are {self.num_experts} experts; "
                "choose at most that many"
            )
        return self


class ParallelStreams(Config):
    """ParScale (arXiv 2505.10475): streams of the same weights, told apart by learned key and value prefixes.

    Attributes:
        streams: how many streams run in parallel; a small network computes the weights that mix their outputs.
        prefix_tokens: length of the learned prefix of each stream and layer.
        smoothing: share of the mixing weight that is spread evenly over the streams.
    """

    streams: int = Field(ge=2, lt=2**31)
    prefix_tokens: Count = 48
    smoothing: float = Field(default=0.01, ge=0, lt=1)


class RotaryScaling(Config):
    """How the frequencies of RoPE were changed so that a model reads longer texts than it was trained on first.

    Attributes:
        type: `linear` divides all frequencies by `factor` (arXiv 2306.15595). The others divide those that turn seldom within
            the original length, and change smoothly to those that turn often, which stay: `llama3` in the number of turns (as
            Llama 3.1 does), `yarn` in the dimensions (arXiv 2309.00071).
        factor: what frequencies are divided by.
        original_length: tokens of the texts that the model was trained on first; set unless `linear`.
        low_turns: frequencies with fewer turns within the original length are divided by the whole factor.
        high_turns: frequencies with more turns stay.
        attention_factor: what queries and keys are multiplied by; of `yarn`.
        truncate: whether the two dimensions are rounded outwards; of `yarn`.
    """

    type: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat32
    original_length: Count | None = None
    low_turns: Annotated[PositiveFloat32, Needs("type", "llama3", "yarn")] = 1.0
    high_turns: Annotated[PositiveFloat32, Needs("type", "llama3", "yarn")] = 4.0
    attention_factor: Annotated[PositiveFloat32, Needs("type", "yarn")] = 1.0
    truncate: Annotated[bool, Needs("type", "yarn")] = True

    @model_validator(mode="after")
    def _complete(self) -> "RotaryScaling":
        if (self.type == "linear") != (self.original_length is None):
            raise ValueError(f"original_length is {self.original_length}, but rotary_scaling.type is {self.type}")
        if self.high_turns <= self.low_turns:
            raise ValueError(f"high_turns {self.high_turns} is not above low_turns {self.low_turns}")
        return self


class Slot(NamedTuple):
    """One application of a block in a forward pass; see `Architecture.slots`.

    Attributes:
        stage: index of the stage, from 0.
        loop: which of the stage's loops, from 0.
        layer: which of the stage's blocks, from 0.
        attention: kind of attention of the stage.
    """

    stage: int
    loop: int
    layer: int
    attention: Attention

    @property
    def has_cache(self) -> bool:
        """Whether this application keeps its own keys and values, or its own state. Cross blocks read the global KV instead."""
        return self.attention != "cross"


class Architecture(Config):
    """Everything that determines the shape of a model and its forward pass.

    Attributes:

        window: keys that a token sees in a sliding layer, itself included; set if and only if a stage is sliding.
        rope_theta: base of the rotary embedding (RoPE) of self-attention, and of the cross-decoder with `rope_cross`.
        rotary_scaling: RoPE scaling; None for none. (Not called `rope_scaling`, which other software rewrites.)
        global_kvs: how many global KVs there are. YOCO has 1. With more, neighbouring cross layers form so many groups, as
            equal as possible, and each group reads one of its own. As many as cross layers are SwiftKV's (arXiv 2410.03960).
        rope_cross: apply RoPE in the cross-decoder too, to its queries and the global keys (YOCO 2024 does, YOCO-U does not).
        attention_bias: add a bias to queries, keys and values, as Qwen2 does.
        qk_norm: apply RMSNorm over head_dim to queries and keys, before RoPE.
        tie_word_embeddings: the LM head reuses the embedding.
        experts: mixture of experts in place of the SwiGLU of width `intermediate_size`.
        parallel: ParScale streams; all stages must then be `full`.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    stages: tuple[Stage, ...]
    window: Count | None = None
    rope_theta: PositiveFloat32 = 10000.0
    rotary_scaling: RotaryScaling | None = None
    global_kvs: Count = 1
    rope_cross: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: PositiveFloat32 = 1e-6
    experts: MixtureOfExperts | None = None
    parallel: ParallelStreams | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        """Let config files name a preset and a size, and override any field: `{preset: yoco_u, size: 100m, loops: 5}`."""
        if not isinstance(data, dict) or "preset" not in data:
            return data
        settings = dict(data)
        for key in settings:
            if not isinstance(key, str):
                raise ValueError(f"key {shown(key)} is no text; expected the name of a setting (quote it if it is one)")
        from yoco_u.architecture.presets import preset  # which is made of this module's classes

        return preset(settings.pop("preset"), **settings).model_dump()

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if not self.has_global_kv:
            yield "rope_cross", "needs a cross stage"

    @model_validator(mode="after")
    def _possible(self) -> "Architecture":
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    @property
    def unrolled_layers(self) -> int:
        """Blocks that a token passes through: layers times loops, summed over the stages."""
        return sum(stage.layers * stage.loops for stage in self.stages)

    @property
    def has_global_kv(self) -> bool:
        return any(stage.attention == "cross" for stage in self.stages)

    @property
    def cross_layers(self) -> int:
        """Blocks of the cross-decoder, each counted once whatever its loops."""
        return sum(stage.layers for stage in self.stages if stage.attention == "cross")

    def global_kv_of(self, stage: int, layer: int) -> int:
        """Which of the `global_kvs` caches a block of a cross stage reads, in all of its loops."""
        before = sum(one.layers for one in self.stages[:stage] if one.attention == "cross")
        return (before + layer) * self.global_kvs // self.cross_layers

    @property
    def looped_stages(self) -> tuple[int, ...]:
        """Indices of the stages whose loop count is above 1; empty for an architecture without a loop."""
        return tuple(i for i, stage in enumerate(self.stages) if stage.loops > 1)

    @property
    def loopable_stages(self) -> tuple[int, ...]:
        """Indices of the stages that `with_loops` gives a loop count: the looped ones, or the first where none loops."""
        return self.looped_stages or (0,)

    @property
    def can_exit_early(self) -> bool:
        """Whether what follows the loop can follow an earlier one: one stage loops, which is not cross, on one stream."""
        return len(self.looped_stages) == 1 and self.stages[self.looped_stages[0]].attention != "cross" and not self.parallel

    @property
    def num_loops(self) -> int:
        """T, the loop count of the model: the largest loop count of any stage."""
        return max(stage.loops for stage in self.stages)

    def num_slots(self, attention: Attention) -> int:
        """How many of the slots have this kind of attention. Counted, not listed: T may be larger than any list could hold."""
        return sum(stage.layers * stage.loops for stage in self.stages if stage.attention == attention)

    def slots(self) -> tuple[Slot, ...]:
        """Every application of a block, in the order of a forward pass: by stage, then by loop, then by layer.

        Whatever belongs to one (stage, loop, layer), such as a cache or a measurement, is numbered by this order. Cross blocks
        own no cache, but have slots too; cross stages come last, so the numbers of all slots with a cache stay 0, 1, 2 ...
        """
        return tuple(
            Slot(index, loop, layer, stage.attention)
            for index, stage in enumerate(self.stages)
            for loop in range(stage.loops)
            for layer in range(stage.layers)
        )

    @property
    def in_words(self) -> str:
        """Stages, width and global KVs beyond one, such as `3 sliding x3 gated + 3 cross, width 128, 3 global KVs`."""
        several = f", {self.global_kvs} global KVs" if self.global_kvs > 1 else ""
        return f"{' + '.join(stage.in_words for stage in self.stages)}, width {self.hidden_size}{several}"

    def dense_transformer(self) -> "Architecture":
        """The plain Transformer to compare with: the same widths and the same number of layers, all full, all applied once.

        A mixture of experts becomes one SwiGLU as wide as all experts that a token visits. There are no QK norms, no biases
        and no ParScale streams.
        """
        inner = self.intermediate_size
        if self.experts is not None:
            inner = self.experts.intermediate_size * (self.experts.experts_per_token + self.experts.shared_experts)
        layers = sum(stage.layers for stage in self.stages)
        return Architecture(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=inner,
            num_attention_heads=self.num_attention_heads, num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim, stages=(Stage(attention="full", layers=layers),), rope_theta=self.rope_theta,
            rotary_scaling=self.rotary_scaling, tie_word_embeddings=self.tie_word_embeddings, rms_norm_eps=self.rms_norm_eps,
        )  # fmt: skip

    def with_loops(self, loops: int) -> "Architecture":
        """The architecture of the same weights when they run with another loop count T >= 1.

        All looped stages get this T. If no stage loops, the first one does.

        Raises:
            UserError: if `loops` is not a whole number from 1 to 256.
        """
        if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
            raise UserError(f"num_loops is {shown(loops)}; expected a whole number of at least 1")
        if problem := too_many_loops(loops):
            raise UserError(f"num_loops: {problem}")
        change = {"loops": loops} if loops > 1 else {"loops": 1, "loop_gate": None}
        looped = self.loopable_stages
        stages = tuple(stage.model_copy(update=change) if i in looped else stage for i, stage in enumerate(self.stages))
        return self.model_copy(update={"stages": stages})

    def behind_the_loop(self) -> "Architecture":
        """What is left of a forward pass after the looped stage: all stages up to that one are applied 0 times."""
        last = self.looped_stages[-1]
        stages = tuple(s.model_copy(update={"loops": 0}) if i <= last else s for i, s in enumerate(self.stages))
        return self.model_copy(update={"stages": stages})


def _problems(a: Architecture) -> list[str]:
    found = []
    if not a.stages:
        return ["stages is empty; give at least one stage, such as {attention: full, layers: 4}"]
    kinds = [stage.attention for stage in a.stages]
    if kinds[0] == "cross":
        found.append("the first stage is cross, but nothing writes the global KV before it; begin with sliding or another kind")
    if "cross" in kinds and any(kind != "cross" for kind in kinds[kinds.index("cross") :]):
        found.append(f"stages are {', '.join(kinds)}: only cross stages can follow a cross stage")
    if a.global_kvs > max(1, a.cross_layers):
        found.append(
            f"global_kvs is {a.global_kvs}, but there are {a.cross_layers} cross layers to read them; give at most one for each"
        )
    if a.num_attention_heads % a.num_key_value_heads:
        found.append(
            f"num_attention_heads {a.num_attention_heads} is not a multiple of num_key_value_heads {a.num_key_value_heads}"
        )
    if a.head_dim % 2:
        found.append(f"head_dim is {a.head_dim}; rotary embedding needs an even number")
    if a.rope_theta <= 1 and a.rotary_scaling is not None and a.rotary_scaling.type == "yarn":
        found.append(f"rope_theta is {a.rope_theta:g}, but yarn needs frequencies that fall; give more than 1")
    if "sliding" in kinds and a.window is None:
        found.append("a stage is sliding but window is not set; give the number of keys that a token sees")
    if "sliding" not in kinds and a.window is not None:
        found.append(f"window is {a.window} but no stage is sliding; drop window or make a stage sliding")
    if a.experts and (a.hidden_size % 8 or a.experts.intermediate_size % 8):
        found.append(
            f"hidden_size is {a.hidden_size} and experts.intermediate_size {a.experts.intermediate_size}; "
            "the grouped products of experts need multiples of 8"
        )
    if a.attention_bias and "retention" in kinds:
        found.append("attention_bias is set, but retention has no biases; drop it or choose another kind of attention")
    if a.parallel and set(kinds) != {"full"}:
        found.append(f"parallel streams need full attention in every stage, got {', '.join(kinds)}")
    return found
