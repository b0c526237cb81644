"""The block tables of all seats: on the host, where steps are planned, and on the device, where kernels read them."""

import numpy as np
import torch
from torch import Tensor

from yoco_u.device import upload
from yoco_u.inference.request import Request


class BlockTables:
    """One row a seat. Only the blocks that are new since the last step are copied.

    Attributes:
        host: (seats, blocks) int32.
        on_device: the same on the device, up to date after `flush`; on a CPU the very same tensor.
    """

    def __init__(self, seats: int, blocks: int, device: torch.device) -> None:
        self.host = torch.zeros(seats, blocks, dtype=torch.int32)
        self.on_device = self.host if device.type == "cpu" else torch.zeros_like(self.host, device=device)
        # By seat: whose blocks its row holds, as (request id, reallocations), and how many of them.
        self._owners: list[tuple[tuple[str, int] | None, int]] = [(None, 0)] * seats
        # What the device's copy lacks: places in the flattened table where new blocks begin, and these blocks.
        self._new: list[tuple[int, list[int]]] = []

    def of(self, request: Request) -> Tensor:
        """The table of a running request, (blocks,) int32, on the host."""
        assert request.seat is not None
        owner = request.id, request.reallocations
        known_owner, known = self._owners[request.seat]
        known = known if known_owner == owner else 0
        blocks, row = request.blocks, self.host[request.seat]
        if len(blocks) > known:
            row[known : len(blocks)] = torch.tensor(blocks[known:], dtype=torch.int32)
            if self.on_device is not self.host:
                self._new.append((request.seat * self.host.shape[1] + known, blocks[known:]))
        self._owners[request.seat] = owner, len(blocks)
        return row[: len(blocks)]

    def flush(self) -> None:
        """Bring the device's copy up to date."""
        if self._new:
            places = np.concatenate([np.arange(at, at + len(blocks)) for at, blocks in self._new])
            blocks = np.concatenate([np.asarray(blocks) for _, blocks in self._new])
            both = upload(np.stack([places, blocks]), self.on_device.device)
            self.on_device.view(-1).index_copy_(0, both[0], both[1].to(torch.int32))
            self._new.clear()
