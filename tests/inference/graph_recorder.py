"""A stand-in for CUDA graphs on a CPU, which holds a replay to what a graph would have replayed.

A graph repeats the launches of its recording: the same operations on the same addresses, with the same shapes and the same
numbers of the host. The recorder runs the recorded function anew at every replay, and fails where anything of this differs, or
where the function waits for the device.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2", "_unique2"}


class _Log(TorchDispatchMode):
    """Every operation with its numbers and, of each tensor, its shape and where it lies: its address, or which result it is."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self._results: dict[int, int] = {}  # by address of the storage
        self._external: set[int] = set()  # addresses that were there before
        self._alive: list[Any] = []  # so that no address is used twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        assert name not in WAITS, f"{name} waits for the device within a graph"
        assert name != "lift_fresh", "a tensor is made of numbers of the host within a graph"
        described = [self._describe(leaf) for leaf in tree_leaves((args, kwargs or {}))]
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._external:
                self._results.setdefault(leaf.untyped_storage().data_ptr(), len(self.operations))
        self._alive.append(out)
        self.operations.append((name, described))
        return out

    def _describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        address = leaf.untyped_storage().data_ptr()
        if address not in self._results:
            self._external.add(address)
        where = ("result", self._results[address]) if address in self._results else ("address", address)
        return where, leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), leaf.dtype


class GraphRecorder:
    """Used as `Capture`.

    Attributes:
        graphs: how many were recorded.
        replays: how often one was replayed.
    """

    def __init__(self) -> None:
        self.graphs = self.replays = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.graphs += 1
        recorded: list[Any] = []

        def replay() -> None:
            self.replays += 1
            with _Log() as log:
                function()
            if not recorded:
                recorded.extend(log.operations)
            assert len(log.operations) == len(recorded), "a replay runs other operations than were recorded"
            for number, (now, before) in enumerate(zip(log.operations, recorded, strict=True)):
                assert now == before, f"operation {number}: {now} where {before} was recorded"

        return replay
