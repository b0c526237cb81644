"""Sharded checkpoints, which are either complete or not there, and which load on any number of processes.

`checkpoints/step-00000100/` holds the shards of torch.distributed.checkpoint (weights and optimizer state by tensor name),
`rng-<rank>.pt` and `trainer.json`. The ranks write it as `step-00000100.partial`, and rank 0 renames it when all are done.
All ranks must see the same folder, so that a run on several machines needs a shared file system.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from yoco_u.architecture import Architecture
from yoco_u.config import Config, differences, parse
from yoco_u.errors import UserError, first_line
from yoco_u.files import PARTIAL, beside, discard, fresh_folder, publish, write_json
from yoco_u.training.distributed import Distributed

TRAINER = "trainer.json"
STEP = "step-"


class TrainerState(Config):
    """`trainer.json`: how far a run has come.

    Attributes:
        format: version of the checkpoint folder.
        step: number of optimizer steps done.
        tokens: number of tokens that these steps read.
        seconds: time that these steps took, without evaluations and checkpoints.
        seed: the run's seed.
        world_size: number of processes that wrote the checkpoint.
        architecture: the model's; only a model of the same architecture loads the checkpoint.
    """

    format: Literal[1] = 1
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    seed: int
    world_size: int
    architecture: Architecture

    def after_step(self, tokens: int, seconds: float) -> "TrainerState":
        return self.model_copy(
            update={"step": self.step + 1, "tokens": self.tokens + tokens, "seconds": self.seconds + seconds}
        )


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, distributed: Distributed) -> None:
        self.folder, self.distributed = folder, distributed

    def newest(self) -> Path | None:
        """The complete checkpoint of the most steps; None if there is none.

        Removes what a killed process left half-written or half-removed.
        """

        def find() -> Path | None:
            for stale in self.folder.glob(f"*{PARTIAL}"):
                discard(stale)
            complete = self._complete()
            return complete[-1] if complete else None

        return self.distributed.on_main(find)

    def save(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainerState) -> Path:
        """Write a checkpoint, which is complete and on the disk when this returns.

        Args:
            name: the folder's name. A run resumes from those named `step_name(state.step)` alone.
        """
        target = self.folder / name
        partial = self.distributed.on_main(lambda: fresh_folder(target))
        with _alone(self.distributed) as single:
            save(_tensors(model, optimizer), storage_writer=FileSystemWriter(partial), no_dist=single)
        torch.save(_rng_state(), partial / _rng_file(self.distributed.rank))
        self.distributed.barrier()

        def complete() -> None:
            write_json(beside(target) / TRAINER, state.model_dump(mode="json"))
            publish(target)

        self.distributed.on_main(complete)
        return target

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints."""

        def remove() -> None:
            for old in self._complete()[:-keep]:
                discard(old)

        self.distributed.on_main(remove)

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, architecture: Architecture) -> TrainerState:
        """Bring the model, the optimizer and this rank's random number generators to the state of a checkpoint.

        Raises:
            UserError: if the checkpoint is damaged, or that of another architecture.
        """
        state = read_state(path)
        difference = next(differences(state.architecture, architecture), None)
        if difference is not None:
            key, saved, wanted = difference
            raise UserError(
                f"{path}: the checkpoint's model has {key} = {saved!r}, this run's {wanted!r}; "
                "use the architecture it was trained with, or another run folder"
            )
        tensors = _tensors(model, optimizer)
        try:
            with _alone(self.distributed) as single:
                load(tensors, checkpoint_id=path, no_dist=single)
        except (OSError, CheckpointException) as error:
            raise UserError(
                f"{path}: the checkpoint is damaged ({first_line(error)}); remove it to go on from the one before"
            ) from None
        set_model_state_dict(model, tensors["model"])
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
        rng = path / _rng_file(self.distributed.rank)
        if rng.exists():
            _set_rng_state(torch.load(rng, weights_only=True))
        return state

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob(f"{STEP}*") if p.suffix != PARTIAL and (p / TRAINER).exists())


def step_name(step: int) -> str:
    return f"{STEP}{step:08d}"


def read_state(path: Path) -> TrainerState:
    """The `trainer.json` of a checkpoint.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return parse(TrainerState, json.loads((path / TRAINER).read_text(encoding="utf-8")), str(path / TRAINER))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path / TRAINER}: not readable ({error}); expected a checkpoint written by training") from None


def full_weights(model: nn.Module) -> dict[str, Any]:
    """All weights, unsharded, on the CPU of rank 0; empty on the other ranks. Every rank must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def _alone(distributed: Distributed) -> Iterator[bool]:
    """Yields whether this is the only process, and keeps torch from warning that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield distributed.world_size == 1


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
