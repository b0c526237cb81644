"""The settings of how a model is trained: its optimizer, its teacher if it has one, its steps and batches."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, model_validator

from yoco_u.architecture import Architecture
from yoco_u.config import Config, Count, EachOnce, Loops, Needs, NonNegativeFloat32, PositiveFloat32, Seed
from yoco_u.config.base import WRITTEN
from yoco_u.training.loop_draw import LoopDraw
from yoco_u.training.phases import LoopPhase, WindowPhase

NonEmptyText = Annotated[str, Field(min_length=1)]

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
    decay_fraction: Annotated[float, Field(gt=0, le=1), Needs("schedule", "wsd")] = 0.2
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)

    def decay_steps(self, steps: int) -> int:
        """Number of steps, at least 1, over which the rate of a run of `steps` decays: with `cosine` all after the warm-up."""
        return max(1, steps - self.warmup_steps if self.schedule == "cosine" else round(self.decay_fraction * steps))


class DistillationConfig(Config):
    """A teacher that a model learns from.

    Attributes:
        teacher: folder of a saved model or run with the same vocabulary, such as the source of a conversion.
        stage: `layers` trains the global KVs and the attention of the cross blocks alone, each to change the teacher's hidden
            states as the teacher's layer in its place does; `logits` trains the model to expect what the teacher expects.
        trains: with `logits`, `all` weights; or `cross`, the global KVs and the cross-decoder alone, which takes about a third
            fewer FLOPs where the two halves are alike.
        architecture: the teacher's, whose FLOPs count as well. It can be left out in a file, since the folder says it.
        share: with `logits`, the weight of the divergence from the teacher; the rest is that of the usual cross-entropy.
        top_k: with `logits`, how many of the teacher's likeliest tokens are told apart in each place.
    """

    teacher: NonEmptyText
    stage: Literal["layers", "logits"] = "logits"
    trains: Annotated[Literal["all", "cross"], Needs("stage", "logits")] = "all"
    architecture: Architecture
    share: Annotated[float, Field(ge=0, le=1), Needs("stage", "logits")] = 0.9
    top_k: Annotated[Count, Needs("stage", "logits")] = 64

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, and not the cross-decoder alone or a part of it."""
        return self.stage == "logits" and self.trains == "all"


TrainingDType = Literal["auto", "bfloat16", "float32"]


class TrainingConfig(Config):
    """How a model is trained.

    Attributes:
        steps: number of optimizer steps.
        sequence_length: tokens per row.
        batch_rows: rows per optimizer step, over all processes and micro-batches.
        micro_batch_rows: rows per forward pass of one process; gradients accumulate until batch_rows is reached.
        seed: seed of the initial weights and of the order of the data.
        dtype: `bfloat16` is autocast over float32 weights; `float32` computes in float32 throughout. `auto` is bfloat16 where
            the machine multiplies it in hardware, else float32; a run goes on in the dtype that it began with.
        weights: quantization-aware training: what the weights of linear layers and of the LM head are rounded to in the passes
            of training and in evaluations, as `yoco-u evaluate --weights` rounds them. Updates and checkpoints are of the
            unrounded weights, and so is the trained model. None for no rounding.
        compile: whether blocks run through torch.compile; `auto` compiles where that can be done: with a C++
            compiler for the CPU, with Triton and a C compiler for a GPU.
        checkpoint_stages: stages, by index, whose activations are recomputed in the backward pass instead of kept.
        parallel: how several processes share the work: `ddp` copies the model, `fsdp` shards it (FSDP2).
        device: a device of torch, or `auto`: a GPU where there is one, otherwise the CPU.
        follow_free_cores: whether training on a CPU takes fewer threads while other programs run, which is faster beside
            them. The results then depend on what else ran, in their last bits, and so do those of a run that is continued.
        evaluate_every: steps between evaluations on the validation split; the last step is always evaluated.
        evaluation_tokens: the most validation tokens that an evaluation scores.
        save_every: steps between checkpoints; the last step is always saved.
        keep_checkpoints: how many of the newest checkpoints are kept.
        evaluate_loops: loop counts T at which each evaluation scores the model as well, beside the architecture's own. Of a
            model without a loop the first stage loops there.
        loop_schedule: phases, from the first step on, that train the model with other loop counts. After the last phase, and in
            every evaluation, the model runs with the architecture's own.
        loop_draw: the distribution that the loop counts of each step are drawn from; None for no drawing. An evaluation runs
            with the architecture's own.
        backward_loops: how many of the last loops of a looped stage gradients go through (truncated backpropagation); None for
            all. The loops before keep no activations. To what lies before the looped stage, the embedding above all, gradients
            pass by them, along the residual stream.
        early_exit_weight: weight of a second loss, which draws the prediction after an earlier loop towards that after the last
            one: the divergence KL(last || earlier), whose gradient goes through the earlier one alone. The loop is drawn anew
            for each step from all before its last. 0 for no such loss.
        window_schedule: phases, from the first step on, with other windows of the sliding layers, such as from long to short.
            After the last phase, and in every evaluation, the window is the architecture's own.
        rope_cross_fades: share of the steps over which the rotary positions of the cross-decoder fade out: its angles shrink
            linearly to none, which is what the architecture has, then and in every evaluation.
        wandb_project: Weights & Biases project that metrics are logged to as well; None logs to files alone.
    """

    steps: Count
    sequence_length: Count = 1024
    batch_rows: Count = 8
    micro_batch_rows: Count = 8
    seed: Seed = 0
    dtype: TrainingDType = "auto"
    weights: Literal["int8", "int4"] | None = None
    compile: Literal["auto", "on", "off"] = "auto"
    checkpoint_stages: tuple[int, ...] = ()
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: str = "auto"
    follow_free_cores: Annotated[bool, Needs("device", "auto", "cpu")] = False
    evaluate_every: Count = 100
    evaluation_tokens: PositiveInt = 262_144
    save_every: Count = 200
    keep_checkpoints: Count = 2
    evaluate_loops: Annotated[tuple[Loops, ...], EachOnce] = ()
    loop_schedule: tuple[LoopPhase, ...] = ()
    loop_draw: LoopDraw | None = None
    backward_loops: Loops | None = None
    early_exit_weight: NonNegativeFloat32 = 0.0
    window_schedule: tuple[WindowPhase, ...] = ()
    rope_cross_fades: float = Field(default=0, ge=0, le=1)
    wandb_project: NonEmptyText | None = None

    @model_validator(mode="after")
    def _phases_follow(self, info: ValidationInfo) -> "TrainingConfig":
        for name, phases in (("loop_schedule", self.loop_schedule), ("window_schedule", self.window_schedule)):
            ends = [phase.until for phase in phases]
            if any(later <= earlier for earlier, later in pairwise(ends)):
                raise ValueError(f"{name} ends its phases at {', '.join(map(str, ends))}; each must end after the one before")
            if len(phases) >= self.steps and phases and info.context != WRITTEN:
                raise ValueError(
                    f"{name} takes {len(phases) + 1} steps at least, one for each phase and one after them, but there are "
                    f"{self.steps}; train longer, or drop some phases"
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
