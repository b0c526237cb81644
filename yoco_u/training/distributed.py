"""The processes of a run: this one alone, or all that torchrun started."""

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from yoco_u.device import find_device

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """This process and its place among the processes of the run.

    Attributes:
        rank: number of this process, 0 .. world_size - 1, over all machines.
        world_size: number of processes, over all machines.
        local_rank: number of this process among those of its machine.
        device: where this process's model lies.
        local_world_size: number of processes on its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 while the other ranks wait. All ranks return its result, or raise its exception."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as problem:
                outcome[1] = problem
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        result, error = outcome
        if error is not None:
            raise error
        return result

    def sum(self, value: float) -> float:
        """The sum over all ranks."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def any(self, value: bool) -> bool:
        return self.sum(float(value)) > 0

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def barrier(self) -> None:
        if self.world_size > 1:
            self.any(False)


@contextmanager
def distributed_session(device: str) -> Iterator[Distributed]:
    """Join the process group of torchrun (gloo between CPUs, nccl between GPUs); without torchrun, be the only process.

    Args:
        device: `auto`, or the name of a device of torch; a GPU without a number is the one of the local rank.

    Raises:
        UserError: if there is no such device.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = find_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    distributed = Distributed(rank, world_size, local_rank, chosen, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        yield distributed
        distributed.barrier()  # no process leaves while another still reads what it sent
    except BaseException as error:
        if world_size > 1:
            traceback.clear_frames(error.__traceback__)  # the frames hold the model, which must be freed below
        raise
    finally:
        if world_size > 1:
            # A DDP model holds the process group, so the model has to be freed first. Were it freed after the group is
            # destroyed, the group's destructor would wait for its threads while it holds the interpreter lock, and a thread
            # that waits for that lock would never end.
            gc.collect()
            dist.destroy_process_group()
