"""Snapshots: the window states that a sequence needs, besides shared blocks, to go on from the end of a cached prefix."""

from collections import OrderedDict
from typing import TypeAlias

SnapshotKey: TypeAlias = bytes
"""Chain hash of the last block before the snapshot's position."""


class SnapshotStore:
    """Snapshots under a byte budget; the least recently used go first.

    Args:
        budget: bytes that all snapshots together may take.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._kept: OrderedDict[SnapshotKey, tuple[object, int]] = OrderedDict()

    def __contains__(self, key: SnapshotKey) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: SnapshotKey, state: object, nbytes: int) -> None:
        """Keep a state of `nbytes` bytes, unless it alone exceeds the budget."""
        if nbytes > self.budget:
            return
        self.discard(key)
        while self.bytes + nbytes > self.budget:
            self.discard(next(iter(self._kept)))
        self._kept[key] = state, nbytes
        self.bytes += nbytes

    def use(self, key: SnapshotKey) -> object:
        """The state kept under `key`, which becomes the most recently used."""
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def discard(self, key: SnapshotKey) -> None:
        """Forget the snapshot, if there is one."""
        _, nbytes = self._kept.pop(key, (None, 0))
        self.bytes -= nbytes
