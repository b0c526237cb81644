"""All settings of a run, as one typed file, and what follows from them: loop counts and windows of steps, FLOPs."""

from functools import lru_cache
from itertools import pairwise

from pydantic import ValidationInfo, model_validator

from yoco_u.architecture import Architecture
from yoco_u.budget import forward_flops, head_flops, self_decoder_flops, training_flops
from yoco_u.config import Config, PositiveFloat32
from yoco_u.config.base import WRITTEN
from yoco_u.data.config import DataConfig
from yoco_u.training.loop_draw import uniform
from yoco_u.training.phases import phase_at, phase_ends
from yoco_u.training.settings import DistillationConfig, NonEmptyText, OptimizerConfig, TrainingConfig, TrainingDType


class RunConfig(Config):
    """Everything that determines a run. A run folder keeps it as `config.yaml`.

    Attributes:
        name: the run's name in tables and plots.
        architecture: the model; `{preset: yoco_u, size: 8m}` in a file, with any field of `Architecture` on top. It can be
            left out in a file with `start_from`, which says it.
        start_from: folder of a saved model or run whose weights the run begins with, and whose tokenizer the dataset has.
        distillation: a teacher to learn from; without it the loss is the cross-entropy of the next token.
        initializer_range: standard deviation of the initial matrices; 1 / sqrt(hidden_size) if none is given.
        dataset: folder of a prepared dataset. If it does not exist, it is prepared there from `data`.
        data: what to prepare the dataset from; without it the dataset must be there already.
        optimizer: AdamW and its learning rate.
        training: how long and with which batches the model is trained.
    """

    name: NonEmptyText
    architecture: Architecture
    start_from: NonEmptyText | None = None
    distillation: DistillationConfig | None = None
    initializer_range: PositiveFloat32 | None = None
    dataset: NonEmptyText
    data: DataConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        steps, optimizer = self.training.steps, self.optimizer
        decay = optimizer.decay_steps(steps)
        if optimizer.warmup_steps + decay > steps:
            raise ValueError(
                f"optimizer.warmup_steps is {optimizer.warmup_steps}, but at most {steps - decay} fit into training.steps "
                f"{steps} beside {decay} step{'s' * (decay != 1)} of decay; set fewer, or train longer"
            )
        stages = len(self.architecture.stages)
        for stage in self.training.checkpoint_stages:
            if not 0 <= stage < stages:
                raise ValueError(f"training.checkpoint_stages names stage {stage}; the model's are 0 to {stages - 1}")
        self._check_loops()
        if self.training.window_schedule and self.architecture.window is None:
            raise ValueError("training.window_schedule changes the window, but the architecture has none; drop it")
        if self.training.rope_cross_fades and (self.architecture.rope_cross or not self.architecture.has_global_kv):
            raise ValueError(
                "training.rope_cross_fades needs a cross-decoder that ends without rotary positions; set "
                "architecture.rope_cross to false, or drop it"
            )
        if self.training.weights and self.training.parallel == "fsdp" and self.architecture.tie_word_embeddings:
            raise ValueError(
                f"training.weights {self.training.weights} rounds the LM head and not the embedding, which fsdp gathers as one "
                "matrix; set training.parallel to ddp, or architecture.tie_word_embeddings to false"
            )
        if self.distillation and not self.architecture.has_global_kv:
            for name, value in (("stage", "layers"), ("trains", "cross")):
                if getattr(self.distillation, name) == value:
                    raise ValueError(f"distillation.{name} {value} trains cross blocks, but the architecture has none; drop it")
        if self.distillation and self.distillation.stage == "layers":
            if self.training.compile == "on":
                raise ValueError(
                    "training.compile on cannot be had with distillation.stage layers, which keeps what each block gets and "
                    "gives; set it to auto or off"
                )
            for stage in self.training.checkpoint_stages:
                if self.architecture.stages[stage].attention == "cross":
                    raise ValueError(
                        f"training.checkpoint_stages {stage} is the cross-decoder, whose blocks distillation.stage layers runs "
                        "one by one; leave it out"
                    )
        if self.start_from and self.initializer_range is not None:
            raise ValueError("initializer_range is for new weights, but start_from says where they come from; drop one of them")
        return self

    def _check_loops(self) -> None:
        training, looped = self.training, self.architecture.looped_stages
        changes = {"loop_schedule": "changes the loop count", "loop_draw": "draws the loop count",
                   "backward_loops": "divides the loops", "early_exit_weight": "leaves the loop"}  # fmt: skip
        for name, does in changes.items():
            if getattr(training, name) and not looped:
                raise ValueError(f"training.{name} {does}, but the architecture has no loop; drop it")
        if training.loop_draw and training.loop_schedule:
            if training.loop_draw.distribution == "uniform":
                raise ValueError("training.loop_schedule is the mean of a draw, but uniform has none; drop one of the two")
            if training.loop_draw.mean is not None:
                raise ValueError("training.loop_schedule and training.loop_draw.mean both say the mean; drop one of the two")
        distillation = self.distillation
        if training.early_exit_weight:
            if training.loop_draw is not None and training.loop_draw.most == 1:
                raise ValueError("training.early_exit_weight needs a loop before the last, but all draws are 1; drop it")
            if distillation:
                raise ValueError("training.early_exit_weight has no place beside a distillation; drop one of the two")
            if not self.architecture.can_exit_early:
                raise ValueError(
                    "training.early_exit_weight needs one looped stage, before the cross-decoder and without parallel streams; "
                    "drop it"
                )
        if training.backward_loops and distillation and not distillation.trains_all:
            raise ValueError("training.backward_loops cuts gradients that this distillation does not have; drop it")

    @model_validator(mode="after")
    def _backward_loops_cut(self, info: ValidationInfo) -> "RunConfig":
        training, draw = self.training, self.training.loop_draw
        counts = [*(stage.loops for stage in self.architecture.stages), *(phase.loops for phase in training.loop_schedule)]
        most = max(counts) if draw is None else draw.most
        if training.backward_loops is None or training.backward_loops < most:
            return self
        if info.context == WRITTEN:
            return self.model_copy(update={"training": training.model_copy(update={"backward_loops": None})})
        raise ValueError(
            f"training.backward_loops {training.backward_loops} cuts nothing, since no step has more than {most} loops; lower "
            "or drop it"
        )

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_rows * self.training.sequence_length

    @property
    def tokens(self) -> int:
        """Training tokens of all steps."""
        return self.training.steps * self.tokens_per_step

    @property
    def loss_is_of_text(self) -> bool:
        """Whether training steps have the loss of text alone: there is no teacher's, and none of an earlier exit is added."""
        return self.distillation is None and not self.training.early_exit_weight

    def with_dtype(self, dtype: TrainingDType) -> "RunConfig":
        return self.model_copy(update={"training": self.training.model_copy(update={"dtype": dtype})})

    def loops_at(self, step: int) -> tuple[int, ...] | tuple[int | None]:
        """Loop counts of training step `step` = 0 .. steps - 1, each for an equal share of its rows.

        It is one, or `loop_draw.per_step`, the smallest first; None where the architecture's own apply.
        """
        planned, draw = self._planned_loops(step), self.training.loop_draw
        if draw is None:
            return (planned,)
        return draw.at(self.training.seed, step, planned or self.architecture.num_loops)

    def loop_counts(self) -> set[int | None]:
        """The loop counts that `loops_at` gives for the steps of the run; of a draw the largest that it may give."""
        if self.training.loop_draw is not None:
            return {self.training.loop_draw.most}
        begins = (0, *phase_ends(self.training.loop_schedule, self.training.steps))
        return {self._planned_loops(begin) for begin in begins if begin < self.training.steps}

    def exit_at(self, step: int, loops: int | None) -> int | None:
        """The loop, counted from 1, after which rows of training step `step` have their earlier exit; None without one.

        Args:
            loops: loop count of the rows, as of `loops_at`.
        """
        loops = loops or self.architecture.num_loops
        if not self.training.early_exit_weight or loops == 1:
            return None
        return 1 + int((loops - 1) * uniform("exit", self.training.seed, step))

    def _planned_loops(self, step: int) -> int | None:
        phase = phase_at(self.training.loop_schedule, self.training.steps, step)
        return None if phase is None else phase.loops

    def window_at(self, step: int) -> int | None:
        """The window of training step `step` = 0 .. steps - 1; None where the architecture has none."""
        phase = phase_at(self.training.window_schedule, self.training.steps, step)
        return self.architecture.window if phase is None else phase.window

    def cross_rotation_at(self, step: int) -> float:
        """What the rotary angles of the cross-decoder are multiplied by in training step `step` = 0 .. steps - 1."""
        share = self.training.rope_cross_fades
        last = max(1, round(share * self.training.steps)) if share else 0
        return 1 - step / last if step < last else float(self.architecture.rope_cross)

    def training_flops(self, steps: int | None = None) -> float:
        """Model FLOPs, forward and backward, of the first `steps` training steps; without `steps`, of the whole run.

        Each step counts with its own loop count. Where this is drawn, `steps` count with what they drew, and the whole run with
        what is expected. Evaluations do not count.
        """
        if self.training.loop_draw is not None and steps is not None:
            return self._drawn_flops(steps)
        steps = self.training.steps if steps is None else steps
        schedules = self.training.loop_schedule, self.training.window_schedule
        changes = (end for phases in schedules for end in phase_ends(phases, self.training.steps))
        ends = sorted({0, steps, *(min(steps, end) for end in changes)})
        return sum(self._expected_flops(begin) * ((end - begin) * self.tokens_per_step) for begin, end in pairwise(ends))

    def _drawn_flops(self, steps: int) -> float:
        so_far = _flops_so_far(self)
        known: dict[tuple[int | None, int | None], float] = {}
        for step in range(len(so_far) - 1, steps):
            keys = [(loops, self.window_at(step)) for loops in self.loops_at(step)]
            for key in keys:
                if key not in known:
                    known[key] = self._token_flops(*key) * self.tokens_per_step
            so_far.append(so_far[-1] + sum(known[key] for key in keys) / len(keys))
        return so_far[steps]

    def _expected_flops(self, step: int) -> float:
        """FLOPs per token of a training step: the mean over the loop counts that it may draw."""
        planned, window, draw = self._planned_loops(step), self.window_at(step), self.training.loop_draw
        if draw is None:
            return self._token_flops(planned, window)
        chances = draw.probabilities(planned or self.architecture.num_loops)
        return sum(chance * self._token_flops(loops, window) for loops, chance in chances.items())

    def _token_flops(self, loops: int | None, window: int | None) -> float:
        """FLOPs per token of a training step with this loop count and window, with those of a teacher."""
        length, training, distillation = self.training.sequence_length, self.training, self.distillation
        own = self.architecture if loops is None else self.architecture.with_loops(loops)
        own = own.model_copy(update={"window": window})
        whole = training_flops(own, length)
        if training.backward_loops is not None:
            last = [min(stage.loops, training.backward_loops) for stage in own.stages]
            stages = tuple(stage.model_copy(update={"loops": n}) for stage, n in zip(own.stages, last, strict=True))
            whole = forward_flops(own, length) + 2 * forward_flops(own.model_copy(update={"stages": stages}), length)
        if training.early_exit_weight and own.num_loops > 1:
            whole += training_flops(own.behind_the_loop(), length)
        if distillation is None:
            return whole
        teacher = forward_flops(distillation.architecture, length)
        if distillation.trains_all:
            return whole + teacher
        if distillation.stage == "logits":
            return whole - 2 * self_decoder_flops(own, length) - head_flops(own) + teacher
        return 3 * forward_flops(own, length) - 2 * self_decoder_flops(own, length) + teacher - 4 * head_flops(own)


@lru_cache(maxsize=4)
def _flops_so_far(config: RunConfig) -> list[float]:
    """Training FLOPs of the first 0, 1, 2 ... steps of a run that draws its loops, as far as they were asked for."""
    return [0.0]
