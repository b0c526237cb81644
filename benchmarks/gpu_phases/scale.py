"""How large everything is that the phases measure: FULL on a GPU, and TOY, which shows on any CPU that every phase runs."""

from dataclasses import dataclass

from yoco_u.architecture import STAGES


@dataclass(frozen=True)
class TrainedModel:
    """A model whose training rate is measured.

    Attributes:
        model: one of our presets, or `llama`, which is transformers' model of the preset `transformer`.
        compiled: whether its blocks run through torch.compile.
        length, rows: tokens of a row, and rows of a step.
    """

    model: str
    size: str
    compiled: bool
    length: int
    rows: int = 1


@dataclass(frozen=True)
class Scale:
    """What the phases measure.

    Attributes:
        device: as torch names it.
        gemm: side of the square matrices of the GEMM rate.
        check_presets, check_sizes: the models whose results are checked.
        check_compiled: whether a compiled model is checked too, which takes a compiler half a minute.
        attention_shapes: (heads, kv heads, head_dim) that kernels are checked with; the last one is that of the 1.3B models.
        attention_lengths: keys of the sequences that kernels are checked with.
        size, contexts, batch, steps, block_size: the models of the paper's tables, and what they run.
        architectures: those of the tables, the most important first.
        rounds: how often a case of the tables is measured.
        trained: in the order of their importance.
        training_steps: how many steps are timed.
    """

    device: str
    gemm: int
    check_presets: tuple[str, ...]
    check_sizes: tuple[str, ...]
    check_compiled: bool
    attention_shapes: tuple[tuple[int, int, int], ...]
    attention_lengths: tuple[int, ...]
    size: str
    contexts: tuple[int, ...]
    batch: int
    steps: int
    block_size: int
    architectures: tuple[str, ...]
    rounds: int
    trained: tuple[TrainedModel, ...]
    training_steps: int


FULL = Scale(
    device="cuda",
    gemm=8192,
    check_presets=tuple(STAGES),
    check_sizes=("test", "8m"),
    check_compiled=True,
    attention_shapes=((4, 4, 16), (4, 2, 8), (8, 1, 64), (20, 4, 128)),
    attention_lengths=(1, 17, 255, 256, 1000, 5000),
    size="1.3b",
    contexts=(8192, 16384, 65536, 262144),
    batch=32,
    steps=128,
    block_size=256,
    architectures=("yoco_u", "yoco", "transformer", "rins"),
    rounds=3,
    trained=(
        TrainedModel("yoco_u", "1.3b", True, 8192),
        TrainedModel("llama", "1.3b", True, 8192),
        TrainedModel("llama", "1.3b", False, 8192),
        TrainedModel("yoco", "1.3b", True, 8192),
        TrainedModel("transformer", "1.3b", True, 8192),
        TrainedModel("yoco_u", "100m", True, 2048, rows=16),
        TrainedModel("llama", "100m", True, 2048, rows=16),
    ),
    training_steps=6,
)

TOY = Scale(
    device="cpu",
    gemm=256,
    check_presets=("yoco_u", "yoco_retention", "parscale"),
    check_sizes=("test",),
    check_compiled=False,
    attention_shapes=((4, 2, 8),),
    attention_lengths=(1, 17, 70),
    size="test",
    contexts=(32, 64),
    batch=2,
    steps=2,
    block_size=16,
    architectures=("yoco_u", "transformer"),
    rounds=1,
    trained=(TrainedModel("yoco_u", "test", False, 32), TrainedModel("llama", "test", False, 32)),
    training_steps=2,
)
