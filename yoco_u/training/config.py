"""The settings of a run, as one typed file."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from yoco_u.architecture import Architecture
from yoco_u.budget import training_flops
from yoco_u.config import Config, Count, NonNegativeFloat32, PositiveFloat32, Seed
from yoco_u.data.config import DataConfig

_Text = Annotated[str, Field(min_length=1)]

_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its learning rate over the steps of a run.

    Attributes:
        learning_rate: the peak of the learning rate.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay; only matrices that multiply activations decay.
        clip_norm: largest gradient norm; larger gradients are scaled down to it.
        schedule: `cosine` decays after the warm-up, down to the last step; `wsd` (warm-up, stable, decay) keeps the peak and
            decays linearly over the last `decay_fraction` of the steps.
        warmup_steps: steps over which the learning rate rises linearly from 0 to the peak.
        decay_fraction: share of the steps over which `wsd` decays.
        final_learning_rate: learning rate of the last step, as a share of the peak.
    """

    learning_rate: PositiveFloat32 = 1e-3
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: PositiveFloat32 = 1e-8
    weight_decay: NonNegativeFloat32 = 0.1
    clip_norm: PositiveFloat32 = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0, lt=2**31)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)

    def decay_steps(self, steps: int) -> int:
        """Number of steps, at least 1, over which the rate of a run of `steps` decays: with `cosine` all after the warm-up."""
        return max(1, steps - self.warmup_steps if self.schedule == "cosine" else round(self.decay_fraction * steps))


class LoopPhase(Config):
    """A part of training with its own loop count.

    Attributes:
        until: share of the steps at which the phase ends. The first phase begins at 0, each further one where the phase before
            it ends.
        loops: loop count T of the phase.
    """

    until: float = Field(gt=0, lt=1)
    loops: Count


class TrainingConfig(Config):
    """How a model is trained.

    Attributes:
        steps: number of optimizer steps.
        sequence_length: tokens per row.
        batch_rows: rows per optimizer step, over all processes and micro-batches.
        micro_batch_rows: rows per forward pass of one process; gradients accumulate until batch_rows is reached.
        seed: seed of the initial weights and of the order of the data.
        dtype: `bfloat16` is autocast over float32 weights; `float32` computes in float32 throughout.
        compile: whether blocks run through torch.compile; `auto` compiles where there is a C++ compiler or a GPU.
        checkpoint_stages: stages, by index, whose activations are recomputed in the backward pass instead of kept.
        parallel: how several processes share the work: `ddp` copies the model, `fsdp` shards it (FSDP2).
        device: a device of torch, or `auto`: a GPU where there is one, otherwise the CPU.
        follow_free_cores: whether training on a CPU takes fewer threads while other programs run, which is faster beside
            them. The results then depend on what else ran, in their last bits, and so do those of a run that is continued.
        evaluate_every: steps between evaluations on the validation split; the last step is always evaluated.
        evaluation_tokens: the most validation tokens that an evaluation scores.
        save_every: steps between checkpoints; the last step is always saved.
        keep_checkpoints: how many of the newest checkpoints are kept.
        loop_schedule: phases, from the first step on, that train the model with other loop counts. After the last phase, and in
            every evaluation, the model runs with the architecture's own.
        wandb_project: Weights & Biases project that metrics are logged to as well; None logs to files alone.
    """

    steps: Count
    sequence_length: Count = 1024
    batch_rows: Count = 8
    micro_batch_rows: Count = 8
    seed: Seed = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: Literal["auto", "on", "off"] = "auto"
    checkpoint_stages: tuple[int, ...] = ()
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: str = "auto"
    follow_free_cores: bool = False
    evaluate_every: Count = 100
    evaluation_tokens: PositiveInt = 262_144
    save_every: Count = 200
    keep_checkpoints: Count = 2
    loop_schedule: tuple[LoopPhase, ...] = ()
    wandb_project: _Text | None = None

    @model_validator(mode="after")
    def _phases_follow(self) -> "TrainingConfig":
        ends = [phase.until for phase in self.loop_schedule]
        if any(later <= earlier for earlier, later in pairwise(ends)):
            raise ValueError(
                f"loop_schedule ends its phases at {', '.join(map(str, ends))}; each must end after the one before"
            )
        return self

    @model_validator(mode="after")
    def _rows_divide(self) -> "TrainingConfig":
        if self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows {self.batch_rows} is not a multiple of micro_batch_rows {self.micro_batch_rows}; "
                "change one of them"
            )
        return self


class RunConfig(Config):
    """Everything that determines a run. A run folder keeps it as `config.yaml`.

    Attributes:
        name: the run's name in tables and plots.
        architecture: the model; `{preset: yoco_u, size: 8m}` in a file, with any field of `Architecture` on top.
        initializer_range: standard deviation of the initial matrices; 1 / sqrt(hidden_size) if none is given.
        dataset: folder of a prepared dataset. If it does not exist, it is prepared there from `data`.
        data: what to prepare the dataset from; without it the dataset must be there already.
        optimizer: AdamW and its learning rate.
        training: how long and with which batches the model is trained.
    """

    name: _Text
    architecture: Architecture
    initializer_range: PositiveFloat32 | None = None
    dataset: _Text
    data: DataConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        steps, optimizer = self.training.steps, self.optimizer
        decay = optimizer.decay_steps(steps)
        if optimizer.warmup_steps + decay > steps:
            raise ValueError(
                f"optimizer.warmup_steps {optimizer.warmup_steps} and {decay} steps of decay do not fit into training.steps "
                f"{steps}; train longer or shorten them"
            )
        stages = len(self.architecture.stages)
        for stage in self.training.checkpoint_stages:
            if not 0 <= stage < stages:
                raise ValueError(f"training.checkpoint_stages names stage {stage}; the model's are 0 to {stages - 1}")
        if self.training.loop_schedule and all(stage.loops == 1 for stage in self.architecture.stages):
            raise ValueError("training.loop_schedule changes the loop count, but the architecture has no loop; drop it")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_rows * self.training.sequence_length

    @property
    def tokens(self) -> int:
        """Training tokens of all steps."""
        return self.training.steps * self.tokens_per_step

    def loops_at(self, step: int) -> int | None:
        """Loop count of training step `step` = 0 .. steps - 1; None where the architecture's own loop counts apply."""
        phases = self.training.loop_schedule
        return next((phase.loops for phase in phases if step < self._end(phase)), None)

    def training_flops(self, steps: int | None = None) -> float:
        """Model FLOPs, forward and backward, of the first `steps` training steps; of all steps by default.

        Each step counts with its own loop count. Evaluations do not count.
        """
        steps = self.training.steps if steps is None else steps
        total, begin = 0.0, 0
        for phase in (*self.training.loop_schedule, None):
            end = min(steps, steps if phase is None else self._end(phase))
            architecture = self.architecture if phase is None else self.architecture.with_loops(phase.loops)
            total += training_flops(architecture, self.training.sequence_length) * ((end - begin) * self.tokens_per_step)
            begin = end
        return total

    def _end(self, phase: LoopPhase) -> int:
        return round(phase.until * self.training.steps)
