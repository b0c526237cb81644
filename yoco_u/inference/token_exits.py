"""Which tokens of a step have left the loop.

A token that has left keeps its state. In the loops that it does not run, later tokens see keys and values that each layer
projects from this state, as if the layers before had not changed it. Decodes that have left are not run at all. The tokens of
a prefill run together until all of them have left; meanwhile those that have left keep their states in front of every layer.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from yoco_u.architecture import Slot
from yoco_u.device import read_back, upload
from yoco_u.inference.exits import ExitRule
from yoco_u.inference.sequence_slice import SequenceSlice, token_ranges
from yoco_u.model.backend import AttentionBackend


class TokenExits:
    """The tokens of one step, in the one stage that loops. All backends of the step share it.

    Args:
        num_loops: T of the requests whose tokens may leave.
    """

    def __init__(self, rule: ExitRule, num_loops: int, device: torch.device) -> None:
        self.num_loops = num_loops
        self._rule, self._device = rule, device
        self._tokens: dict[int, range] = {}  # of requests whose tokens may leave, by seat
        self._gone: set[int] = set()  # seats whose tokens have all left
        self._some_left = False  # of the other seats
        self._masks: dict[int, Tensor] = {}  # which tokens have left, by how many slices run
        self.begin([])

    def begin(self, slices: Sequence[SequenceSlice]) -> None:
        """A pass of these slices, one behind the other, enters the stage that loops."""
        tokens = token_ranges(slices)
        own = [(one, its) for one, its in zip(slices, tokens, strict=True) if one.exit_threshold is not None]
        count = tokens[-1].stop if tokens else 0
        self._tokens = {one.seat: its for one, its in own}
        self._numbers = [token for _, its in own for token in its]  # of the tokens that may leave
        self._thresholds = [one.exit_threshold or 0.0 for one, its in own for _ in its]
        self._index = None if len(self._numbers) == count else upload(self._numbers, self._device)
        self._left = [False] * count
        self._loops = [self.num_loops] * count

    def end_loop(self, loop: int, before: Tensor, after: Tensor) -> tuple[Tensor, list[int]]:
        """A loop has run; some tokens leave.

        Args:
            loop: which one, from 0.
            before, after: states of all tokens of the pass, (1, tokens, [streams,] hidden).

        Returns:
            The states after the loop, in which the tokens that had left before have kept theirs; and the seats whose last
            token has left just now.
        """
        if self._some_left:
            left = upload(self._left, self._device)
            after = torch.where(left.view(1, -1, *[1] * (after.ndim - 2)), before, after)
        if loop + 1 >= self.num_loops or not self._numbers:
            return after, []
        own = (x[0] if self._index is None else x[0, self._index] for x in (before, after))
        leaving = [
            token
            for token, score, threshold in zip(
                self._numbers, read_back(self._rule.scores(loop, *own)), self._thresholds, strict=True
            )
            if score < threshold and not self._left[token]
        ]
        for token in leaving:
            self._left[token], self._loops[token] = True, loop + 1
        return after, self._update_slices() if leaving else []

    def _update_slices(self) -> list[int]:
        """Look which slices some or all tokens have left. Returns the seats whose last token has left just now."""
        gone, self._some_left, self._masks = [], False, {}
        for seat, own in self._tokens.items():
            if seat not in self._gone:
                left = self._left[own.start : own.stop]
                if all(left):
                    gone.append(seat)
                self._some_left |= any(left) and not all(left)
        self._gone.update(gone)
        return gone

    def has_gone(self, one: SequenceSlice) -> bool:
        """Whether all tokens of a slice have left."""
        return one.seat in self._gone

    def hold(self, slices: Sequence[SequenceSlice], before: Tensor, x: Tensor) -> Tensor:
        """What the next block reads, where tokens that have left keep the states that they had before the loop.

        Args:
            slices: that run.
            before, x: states of their tokens, (1, tokens, [streams,] hidden).
        """
        if not self._some_left:
            return x
        if len(slices) not in self._masks:
            own = (self._tokens.get(one.seat) for one in slices)
            left = (
                [False] * one.count if its is None else self._left[its.start : its.stop]
                for one, its in zip(slices, own, strict=True)
            )
            self._masks[len(slices)] = upload(list(chain.from_iterable(left)), self._device)
        return torch.where(self._masks[len(slices)].view(1, -1, *[1] * (x.ndim - 2)), before, x)

    def later_loops(self, slot: Slot) -> Iterator[Slot]:
        """The slots of the same layer in the loops after that of `slot`."""
        return (slot._replace(loop=loop) for loop in range(slot.loop + 1, self.num_loops))

    def loops(self) -> dict[int, list[int]]:
        """How many loops the tokens have run, by the seat of their request."""
        return {seat: self._loops[own.start : own.stop] for seat, own in self._tokens.items()}


class LoopingBackend(AttentionBackend):
    """What the engine's backends have in common: each loop runs on the requests whose tokens are still in it.

    Args:
        slices: that the pass runs.
        exits: of tokens that may leave the loop; None where there are none.
    """

    def __init__(self, slices: Sequence[SequenceSlice], exits: TokenExits | None) -> None:
        self.slices, self.exits = slices, exits
        self._in_loop: dict[int, tuple[Tensor | None, AttentionBackend]] = {}  # by how many slices are left

    @abstractmethod
    def part(self, chosen: Sequence[bool]) -> tuple[Tensor | None, AttentionBackend]:
        """All tokens of some of the slices: their indices, None for all slices, and their backend."""
        ...

    def in_loop(self, loop: int) -> tuple[Tensor | None, AttentionBackend]:
        if self.exits is not None and loop == 0:
            self.exits.begin(self.slices)
        running = [one.num_loops > loop and not (self.exits and self.exits.has_gone(one)) for one in self.slices]
        left = sum(running)
        if left not in self._in_loop:
            self._in_loop[left] = self.part(running)
        return self._in_loop[left]

    def hold(self, loop: int, before: Tensor, x: Tensor) -> Tensor:
        return x if self.exits is None or loop == 0 else self.exits.hold(self.slices, before, x)

    def end_loop(
        self, loop: int, before: Tensor, after: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, AttentionBackend] | None]:
        if self.exits is None:
            return after, None
        after, seats = self.exits.end_loop(loop, before, after)
        return after, self.part([one.seat in seats for one in self.slices]) if seats else None
