"""Sharded checkpoints, which are either complete or not there, and which load on any number of processes.

`checkpoints/step-00000100/` holds the shards of torch.distributed.checkpoint (weights and optimizer state by tensor name),
`rng-<rank>.pt`, `trainer.json` and the checksums of all of them. The ranks write it as `step-00000100.partial`, and rank 0
renames it when all are done. All ranks must see the same folder, so that a run on several machines needs a shared file system.

Training goes on while a checkpoint is written: `save` copies the state, and threads write the copy.
"""

import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import async_save

from yoco_u.architecture import Architecture
from yoco_u.checksums import added_or_changed, verify_checksums, write_checksums
from yoco_u.config import Config, differences
from yoco_u.config.numbers import Seed
from yoco_u.errors import UserError, first_line, naming
from yoco_u.files import DamagedFile, read_json, write_json
from yoco_u.folders import PARTIAL, NewFolder, discard, free_name, marked, numbered
from yoco_u.training.checkpoint_reader import load_shards
from yoco_u.training.distributed import Distributed

TRAINER = "trainer.json"
DAMAGED = ".damaged"
"""Suffix of checkpoints that were found damaged. No run continues from them, and nothing removes them."""

# torch says so on the thread that writes, where no context could keep it from that.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# A stager keeps the memory of its copies, which makes all but the first fast. Before torch 2.13 it can copy only once.
_STAGERS_LAST = torch.__version__ >= "2.13"

_NAME = re.compile(r"step-[0-9]{8,}")


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
        run: the id of the run, see `yoco_u.training.ownership`; None in checkpoints of earlier versions.
    """

    format: Literal[1] = 1
    step: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    seed: Seed
    world_size: PositiveInt
    architecture: Architecture
    run: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")] | None = None

    def after_step(self, tokens: int, seconds: float) -> "TrainerState":
        return self.model_copy(
            update={"step": self.step + 1, "tokens": self.tokens + tokens, "seconds": self.seconds + seconds}
        )


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, distributed: Distributed) -> None:
        self.folder, self.distributed = folder, distributed
        # Beside those of training, so that the collectives of a checkpoint may come at any moment of a step.
        self._group = dist.new_group(backend="gloo") if distributed.world_size > 1 else None
        self._stager = _new_stager()
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._new: NewFolder | None = None  # of rank 0, while it is filled

    def newest(self) -> tuple[Path | None, list[str]]:
        """The checkpoint of the most steps that is not damaged, None if there is none; and what is wrong with later ones.

        Damaged ones are renamed. What a killed process left half-written or half-removed is removed.

        Raises:
            OSError, UserError: if one cannot be opened, which says nothing about what is in it.
        """

        def find() -> tuple[Path | None, list[str]]:
            for stale in self.folder.glob(f"*{PARTIAL}"):
                discard(stale)
            problems: list[str] = []
            for path in reversed(self._all()):
                try:
                    verify_checksums(path, "the checkpoint is set aside")
                    if not (path / TRAINER).is_file():
                        raise DamagedFile(f"{path / TRAINER}: the file is missing; the checkpoint is set aside")
                    read_state(path)
                    return path, problems
                except DamagedFile as error:
                    problems.append(str(error))
                    _set_aside(path)
            return None, problems

        return self.distributed.on_main(find)

    def save(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainerState, keep: int) -> Path:
        """Copy the state, and begin to write the copy. The checkpoint appears under its name when it is on the disk.

        Args:
            name: the folder's name. A run resumes from those named `step_name(state.step)` alone.
            keep: how many of the newest checkpoints are left once it is there.

        Raises:
            OSError, UserError: if the checkpoint before this one could not be written, see `wait`.
        """
        self.wait()
        if not _STAGERS_LAST:
            self._stager = _new_stager()
        target = self.folder / name
        partial = self.distributed.on_main(lambda: self._open(target))
        try:
            torch.save(_rng_state(), partial / _rng_file(self.distributed.rank))
            written = async_save(
                _tensors(model, optimizer),
                storage_writer=FileSystemWriter(partial),
                async_stager=self._stager,
                process_group=self._group,
                no_dist=self.distributed.world_size == 1,
            )
        except BaseException:
            self._close()
            raise
        assert isinstance(written, Future)
        self._writing = self._finisher.submit(self._finish, written, target, state, keep)
        return target

    def spare_name(self, name: str) -> str:
        """`name` for `save`, with a number if what has that name is to stay: a user has added to it, or it is not ours."""

        def find() -> str:
            places = numbered(self.folder / name)
            return next(it.name for it in places if not os.path.lexists(it) or (marked(it) and not added_or_changed(it)))

        return self.distributed.on_main(find)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._writing is not None and not self._writing.done()

    @property
    def failed(self) -> bool:
        """Whether this process knows by now that the checkpoint could not be written. `wait` raises the reason."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Return when the checkpoint that was begun last is complete and on the disk.

        Raises:
            OSError: if the disk is full, or cannot be written to.
            UserError: if it could not be written for another reason, or by another process.
        """
        writing, self._writing = self._writing, None
        problem = writing.exception() if writing is not None else None
        if self.distributed.any(problem is not None):
            if isinstance(problem, OSError):
                raise problem
            raise UserError(
                f"{self.folder}: the checkpoint could not be written ({_reason(problem)}); mend that, and run the same command "
                "again to continue from the one before"
            )

    def close(self) -> None:
        """Give the memory of the copy back, after the last checkpoint."""
        self._finisher.shutdown()
        self._stager.close()

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, architecture: Architecture) -> TrainerState:
        """Bring the model, the optimizer and this rank's random number generators to the state of a checkpoint.

        Raises:
            UserError: if the checkpoint is damaged, or that of another architecture.
        """
        state = _state_of(path, architecture)
        tensors = _tensors(model, optimizer)
        rng = path / _rng_file(self.distributed.rank)
        with _telling_damage(path):
            load_shards(tensors, path, no_dist=self.distributed.world_size == 1)
            rng_state = torch.load(rng, weights_only=True) if rng.exists() else None
        set_model_state_dict(model, tensors["model"])
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
        if rng_state is not None:
            _set_rng_state(rng_state)
        return state

    def _finish(self, written: Future[Any], target: Path, state: TrainerState, keep: int) -> None:
        """On a thread: wait until all ranks have written their shards, then complete the checkpoint on rank 0."""
        try:
            with naming(target):
                written.result()
                if self._new is None:
                    return
                write_json(self._new.folder / TRAINER, state.model_dump(mode="json"))
                write_checksums(self._new.folder)
                self._new.publish()
        finally:
            self._close()
        for old in self._all()[:-keep]:
            if not added_or_changed(old):
                discard(old)

    def _open(self, target: Path) -> Path:
        self._new = NewFolder(target)
        return self._new.folder

    def _close(self) -> None:
        new, self._new = self._new, None
        if new is not None:
            new.close()

    def _all(self) -> list[Path]:
        """The checkpoints that runs resume from, oldest first."""
        found = [path for path in self.folder.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _new_stager() -> DefaultStager:
    return DefaultStager(StagingOptions(False, False, False, False))  # copies at once, without threads and pinned memory


def _reason(error: BaseException | None) -> str:
    """The first line of what went wrong, in whichever process."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error) if error is not None else "in another process"


def _set_aside(path: Path) -> None:
    path.rename(free_name(path.with_name(path.name + DAMAGED)))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def read_state(path: Path) -> TrainerState:
    """The `trainer.json` of a checkpoint.

    Raises:
        UserError: if it cannot be read.
    """
    return read_json(path / TRAINER, TrainerState)


def load_weights(path: Path, model: nn.Module, architecture: Architecture) -> None:
    """Bring a whole model, in this process alone, to the weights of a checkpoint; errors as of `Checkpoints.load`."""
    _state_of(path, architecture)
    tensors = {"model": get_model_state_dict(model)}
    with _telling_damage(path):
        load_shards(tensors, path, no_dist=True)
    set_model_state_dict(model, tensors["model"])


def full_weights(model: nn.Module) -> dict[str, Any]:
    """All weights, unsharded, on the CPU of rank 0; empty on the other ranks. Every rank must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _state_of(path: Path, architecture: Architecture) -> TrainerState:
    state = read_state(path)
    difference = next(differences(state.architecture, architecture), None)
    if difference is not None:
        key, saved, wanted = difference
        raise UserError(
            f"{path}: the checkpoint's model has {key} = {saved!r}, this run's {wanted!r}; "
            "use the architecture it was trained with, or another run folder"
        )
    return state


@contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch and pickle raise nearly anything on damaged files
        raise UserError(
            f"{path}: the checkpoint is damaged ({_reason(error)}); remove it to go on from the one before"
        ) from None


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
