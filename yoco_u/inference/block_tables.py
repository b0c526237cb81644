"""The block tables of all seats: on the host, where steps are planned, and on the device, where kernels read them."""

import numpy as np
import torch
from torch import Tensor

from yoco_u.device import upload
from yoco_u.inference.request import Request


def table_bytes(seats: int, blocks: int, device: torch.device) -> int:
    """Bytes on a device of the tables of so many seats and blocks; on a GPU recorded steps read a second copy."""
    return 4 * seats * blocks * (1 if device.type == "cpu" else 2)


class BlockTables:
    """One row a seat. Only the blocks that are new since the last step are copied.

    Attributes:
        host: (seats, blocks) int32.
        on_device: the same on the device, up to date after `flush`; on a CPU the very same tensor.
    """

    def __init__(self, seats: int, blocks: int, device: torch.device) -> None:
        self.host = torch.zeros(seats, blocks, dtype=torch.int32)
        self.on_device = self.host if device.type == "cpu" else torch.zeros_like(self.host, device=device)
        self._held = [(-1, 0)] * seats  # by seat: the allocation whose blocks its row holds, and how many of them
        self._new: dict[int, int] = {}  # what the device's copy lacks: blocks, by their places in the flattened table

    @property
    def nbytes(self) -> int:
        """See `table_bytes`."""
        seats, blocks = self.host.shape
        return table_bytes(seats, blocks, self.on_device.device)

    def of(self, request: Request) -> Tensor:
        """The table of a running request, (blocks,) int32, on the host."""
        assert request.seat is not None
        allocation, known = self._held[request.seat]
        known = known if allocation == request.allocation else 0
        blocks, row = request.blocks, self.host[request.seat]
        if len(blocks) > known:
            row[known : len(blocks)] = torch.tensor(blocks[known:], dtype=torch.int32)
            if self.on_device is not self.host:
                first = request.seat * self.host.shape[1]
                self._new.update(zip(range(first + known, first + len(blocks)), blocks[known:], strict=True))
        self._held[request.seat] = request.allocation, len(blocks)
        return row[: len(blocks)]

    def flush(self) -> None:
        """Bring the device's copy up to date."""
        if self._new:
            both = upload(np.array([list(self._new), list(self._new.values())]), self.on_device.device)
            self.on_device.view(-1).index_copy_(0, both[0], both[1].to(torch.int32))
            self._new.clear()
