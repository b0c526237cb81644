"""What one request runs in one step, as the attention backends of the engine see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor


@dataclass(frozen=True)
class SequenceSlice:
    """What one request runs in a step: the tokens start .. start + count - 1 of its sequence.

    Attributes:
        kept: for how many of them, the last ones, logits are asked for.
        written: the keys and values before this position are in the pages already, in blocks shared with other requests, and
            must not be written again.
        seat: the request's row in every window ring and retention state.
        block_table: the request's blocks of the pages, (blocks,) int32, on the host.
        num_loops: T of the request.
        exit_threshold: a token whose score is below it leaves the loop, see `exits.py`; None where all run all loops.
        one_by_one: whether each token attends as a decode does, beside those of other requests, and not the slice by itself.
            That is faster for a few tokens, which may be drafted ones.
    """

    start: int
    count: int
    kept: int
    written: int
    seat: int
    block_table: Tensor
    num_loops: int
    exit_threshold: float | None = None
    one_by_one: bool = False

    @property
    def end(self) -> int:
        return self.start + self.count


def token_ranges(slices: Sequence[SequenceSlice]) -> list[range]:
    """Which tokens of a step each of its slices has, which stand one behind the other."""
    ends = accumulate(one.count for one in slices)
    return [range(end - one.count, end) for one, end in zip(slices, ends, strict=True)]
