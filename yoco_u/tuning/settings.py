"""The settings of supervised fine-tuning."""

from pydantic import Field

from yoco_u.config import Config, Count, NonNegativeFloat32, PositiveFloat32, Seed


class SFTSettings(Config):
    """How a model is fine-tuned on chats.

    Attributes:
        epochs: how often each chat is read, unless `steps` says how long training takes.
        steps: number of optimizer steps; None for `epochs`.
        length: the most tokens of a row. Chats are packed into rows without seeing each other; longer ones are cut.
        batch_rows: rows per optimizer step.
        micro_batch_rows: rows per forward pass; gradients accumulate until batch_rows is reached.
        learning_rate: the peak of the learning rate, which rises over the first 3% of the steps and then falls as a cosine.
        weight_decay: AdamW's weight decay.
        lora_rank: train adapters of this rank beside the linear layers (LoRA, arXiv 2106.09685) instead of all weights; 0 for
            all weights. In the end they are merged into the weights.
        num_loops: T of training; None for the model's own.
        seed: of the order of the chats.
        save_every: steps between checkpoints.
    """

    epochs: PositiveFloat32 = 1.0
    steps: Count | None = None
    length: Count = 1024
    batch_rows: Count = 8
    micro_batch_rows: Count = 1
    learning_rate: PositiveFloat32 = 2e-5
    weight_decay: NonNegativeFloat32 = 0.0
    lora_rank: int = Field(default=0, ge=0, lt=2**16)
    num_loops: Count | None = None
    seed: Seed = 0
    save_every: Count = 100
