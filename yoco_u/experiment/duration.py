"""How long a grid will train: on a GPU by arithmetic, on this machine by trying a few steps of each of its models."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from yoco_u.budget import forward_flops
from yoco_u.data.config import MINIMUM_VOCABULARY, DataConfig
from yoco_u.experiment.grid import GridRun
from yoco_u.loading import tokenizer_folder
from yoco_u.planning.hardware import find_hardware
from yoco_u.training.config import RunConfig

ASSUMED_SHARE = 0.3
"""Share of the hardware's rate of matrix products that training is assumed to reach."""

Rate = Callable[[RunConfig], float]
"""Model FLOPs per second that the training of a run reaches."""

_TRIED_STEPS = 5
_WORDS = 20_000  # of the made-up text that is trained on when a rate is measured, beside one for each token of a row


@dataclass(frozen=True)
class RunTime:
    """The predicted time of one run, alone on the machine.

    Attributes:
        flops: model FLOPs of its training and of its evaluations.
        seconds: predicted time; of compiling, of saving and of measures there is nothing in it.
    """

    run: GridRun
    flops: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"run": self.run.name, "flops": self.flops, "minutes": self.seconds / 60}


def predict(runs: Sequence[GridRun], rate: Rate) -> list[RunTime]:
    """The predicted time of each run, whether it is finished or not."""
    return [RunTime(run, flops := _flops(run.config), flops / rate(run.config)) for run in runs]


def assumed_rate(hardware: str) -> Rate:
    """ASSUMED_SHARE of what the hardware multiplies in the dtype of a run.

    Raises:
        UserError: when the rate is asked for, if there is no such hardware.
    """
    return lambda config: ASSUMED_SHARE * find_hardware(hardware, config.training.dtype).gemm


def measured_rate(say: Callable[[str], None] = lambda _: None) -> Rate:
    """What this machine reaches in a few steps on made-up text; models that several runs share are tried once.

    Args:
        say: called with a line of text before each trial.
    """
    known: dict[str, float] = {}

    def rate(config: RunConfig) -> float:
        trial = _trial(config)
        key = trial.model_dump_json()
        if key not in known:
            say(f"trying {config.name}")
            known[key] = _try(trial)
        return known[key]

    return rate


def _flops(config: RunConfig) -> float:
    training, own = config.training, config.architecture
    evaluations = -(-training.steps // training.evaluate_every)
    scored = [own, *(own.with_loops(loops) for loops in training.evaluate_loops)]
    per_token = sum(forward_flops(architecture, training.sequence_length) for architecture in scored)
    return config.training_flops() + evaluations * training.evaluation_tokens * per_token


def _trial(config: RunConfig) -> RunConfig:
    """The first steps of a run, without what does not change how fast they are."""
    training = config.training.model_copy(
        update={
            "steps": _TRIED_STEPS, "seed": 0, "evaluation_tokens": 1, "evaluate_loops": (), "loop_schedule": (),
            "loop_draw": None, "wandb_project": None,
        }
    )  # fmt: skip
    optimizer = config.optimizer.model_copy(update={"warmup_steps": 0, "learning_rate": 1e-3})
    return config.model_copy(
        update={"name": "trial", "training": training, "optimizer": optimizer, "dataset": "", "data": None}
    )


def _try(trial: RunConfig) -> float:
    import torch

    from yoco_u.training.trainer import train

    torch.compiler.reset()  # each model compiles its own blocks; those of all together would exceed torch's limit
    model = trial.start_from or (trial.distillation and trial.distillation.teacher)
    tokens: Any = {"tokenizer": str(tokenizer_folder(model))} if model else {"vocab_size": MINIMUM_VOCABULARY}
    words = _WORDS + trial.training.sequence_length
    with TemporaryDirectory() as name:
        folder, texts = Path(name), random.Random(0)
        for split in ("train", "validation"):
            text = " ".join("".join(texts.choices("etaoin", k=texts.randint(1, 9))) for _ in range(words))
            (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        data = DataConfig(
            corpus=(str(folder / "train.jsonl"),), validation_corpus=(str(folder / "validation.jsonl"),), **tokens
        )
        config = trial.model_copy(update={"data": data, "dataset": str(folder / "data")})
        return float(train(config, folder / "run", progress=False)["model_flops_per_second"])
