"""Who takes part in a run: one process, or those that torchrun started."""

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
    """This process among those of the run.

    Attributes:
        rank: 0 .. world_size - 1, over all machines.
        local_rank: on this machine.
        device: of this process's model.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call on rank 0 while the others wait; all get its result, or raise its exception."""
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
    """Join the processes that torchrun started (gloo between CPUs, nccl between GPUs), or be alone.

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
    distributed = Distributed(rank, world_size, local_rank, chosen)
    try:
        yield distributed
        distributed.barrier()  # none leaves while another still reads what it sent
    except BaseException as error:
        if world_size > 1:
            traceback.clear_frames(error.__traceback__)  # they hold the model
        raise
    finally:
        if world_size > 1:
            # A DDP model holds the group. Were it freed after this, the group would wait for its threads with the interpreter's
            # lock held, and they perhaps for the lock.
            gc.collect()
            dist.destroy_process_group()
