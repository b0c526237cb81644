"""Which tokens of a step have left the loop.

A token that has left keeps its state. In the loops that it does not run, later tokens see its keys and values of the last loop
that it ran, layer by layer. Decodes that have left are not run at all. The tokens of a prefill run together until all of them
have left; meanwhile those that have left are computed and set aside.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from yoco_u.inference.exits import ExitRule
from yoco_u.inference.sequence_slice import SequenceSlice


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
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of prefills in the newest loop, by seat and layer
        self.begin([], [])

    def begin(self, slices: Sequence[SequenceSlice], tokens: Sequence[range]) -> None:
        """A pass enters the stage that loops.

        Args:
            slices: of the pass.
            tokens: which tokens of the pass each of them has.
        """
        own = [(one, its) for one, its in zip(slices, tokens, strict=True) if one.exit_threshold is not None]
        self._tokens = {one.seat: its for one, its in own}
        self._index = torch.tensor([token for _, its in own for token in its], dtype=torch.long, device=self._device)
        thresholds = [one.exit_threshold for one, its in own for _ in its]
        self._thresholds = torch.tensor(thresholds, dtype=torch.float64, device=self._device)
        count = tokens[-1].stop if tokens else 0
        self._left = torch.zeros(count, dtype=torch.bool, device=self._device)
        self._loops = torch.full((count,), self.num_loops, device=self._device)

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
            after = torch.where(self._left.view(1, -1, *[1] * (after.ndim - 2)), before, after)
        if loop + 1 >= self.num_loops or not len(self._index):
            return after, []
        scores = self._rule.scores(loop, before[0, self._index], after[0, self._index])
        leaving = self._index[(scores < self._thresholds) & ~self._left[self._index]]
        self._left[leaving], self._loops[leaving] = True, loop + 1
        left, gone, self._some_left = self._left.tolist(), [], False
        for seat, own in self._tokens.items():
            if seat in self._gone:
                continue
            if all(left[own.start : own.stop]):
                gone.append(seat)
            elif any(left[own.start : own.stop]):
                self._some_left = True
        self._gone.update(gone)
        return after, gone

    def has_gone(self, one: SequenceSlice) -> bool:
        """Whether all tokens of a slice have left."""
        return one.seat in self._gone

    def replace(self, layer: int, prefills: Sequence[tuple[SequenceSlice, slice]], k: Tensor, v: Tensor) -> None:
        """Give the tokens of prefills that have left their keys and values of the loop before.

        Args:
            layer: whose keys and values they are, in its stage.
            prefills: slices, and which of the tokens each of them has.
            k, v: of a new loop, (1, tokens, kv_heads, head_dim); changed in place.
        """
        for one, tokens in prefills:
            if one.exit_threshold is None:
                continue
            own, key = self._tokens[one.seat], (one.seat, layer)
            if self._some_left and key in self._kv:
                left = self._left[own.start : own.stop, None, None]
                for x, before in zip((k, v), self._kv[key], strict=True):
                    x[0, tokens] = torch.where(left, before, x[0, tokens])
            self._kv[key] = k[0, tokens], v[0, tokens]

    def loops(self) -> dict[int, list[int]]:
        """How many loops the tokens have run, by the seat of their request."""
        found = self._loops.tolist()
        return {seat: found[own.start : own.stop] for seat, own in self._tokens.items()}
