"""The settings of fine-tuning."""

from typing import Annotated

from pydantic import Field

from yoco_u.config import Config, Count, Loops, Needs, NonNegativeFloat32, PositiveFloat32


class TuningSettings(Config):
    """What all ways of fine-tuning are told.

    Attributes:
        micro_batch_rows: rows per forward pass; gradients accumulate over a step.
        learning_rate: the peak of the learning rate.
        weight_decay: AdamW's weight decay.
        lora_rank: train adapters of this rank beside the linear layers (LoRA, arXiv 2106.09685) instead of all weights; 0 for
            all weights. In the end they are merged into the weights.
        num_loops: T of training; None for the model's own.
        seed: of the order of the data, and of what is sampled.
        save_every: steps between checkpoints.
    """

    micro_batch_rows: Count = 1
    learning_rate: PositiveFloat32 = 2e-5
    weight_decay: NonNegativeFloat32 = 0.0
    lora_rank: int = Field(default=0, ge=0, lt=2**16)
    num_loops: Loops | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)  # transformers seeds numpy's old generator with it
    save_every: Count = 100


class SFTSettings(TuningSettings):
    """How a model is fine-tuned on chats. The learning rate rises over the first 3% of the steps and then falls as a cosine.

    Attributes:
        epochs: how often each chat is read, unless `steps` says how long training takes.
        steps: number of optimizer steps; None for `epochs`.
        length: the most tokens of a row. Chats are packed into rows without seeing each other; longer ones are cut,
            which is told.
        batch_rows: rows per optimizer step, a multiple of `micro_batch_rows`.
    """

    epochs: Annotated[float, Field(gt=0, le=10_000), Needs("steps", None)] = 1.0
    steps: Count | None = None
    length: Count = 1024
    batch_rows: Count = 8


class GRPOSettings(TuningSettings):
    """How a model is trained on problems by the rewards of its own answers. The learning rate stays as it is.

    Attributes:
        steps: number of optimizer steps.
        problems: problems per step.
        answers: answers that are sampled for each of them, whose rewards are compared with each other.
        max_tokens: the most tokens of an answer.
        pattern: a regular expression. The answer of a completion is what its last match, or the match's first group, says.
            Blanks around it do not count.
        test_every: steps between tests on held-out problems.
    """

    steps: Count = 100
    problems: Count = 8
    answers: int = Field(default=8, ge=2, lt=2**16)
    micro_batch_rows: Count = 8
    max_tokens: Count = 256
    learning_rate: PositiveFloat32 = 1e-6
    pattern: str = r"\S(?:.*\S)?"
    test_every: Count = 20
