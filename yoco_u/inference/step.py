"""What the scheduler decides for one step of the engine."""

from dataclasses import dataclass, field

from torch import Tensor

from yoco_u.inference.request import Request
from yoco_u.inference.snapshots import SnapshotKey


@dataclass(frozen=True)
class Chunk:
    """What one request computes in one step: its tokens start .. start + count - 1, and those that were drafted behind them.

    Attributes:
        drafts: tokens that may follow the last known one. Logits behind each say whether they do.
    """

    request: Request
    start: int
    count: int
    drafts: list[int] = field(default_factory=list, compare=False)

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def tokens(self) -> list[int]:
        return self.request.token_slice(self.start, self.end) + self.drafts

    @property
    def samples(self) -> bool:
        """Whether the last known token is computed, so that a new one is to be sampled; true until the new one is appended."""
        return self.end == self.request.num_tokens

    @property
    def completes(self) -> bool:
        """Whether the request samples nothing and this chunk computes the last token that it needs."""
        return not self.request.params.max_tokens and self.end == self.request.num_needed


@dataclass
class Step:
    """What the engine does in one step.

    Attributes:
        chunks: at most one per request, shortest first. A chunk that starts at 0 begins with an empty window state.
        restores: before the step runs, load the window state into the request's seat.
        snapshots: after it ran, copy the window state of the request's seat and give it to `Scheduler.keep_snapshot`.
        preempted: requests that lost their blocks and seat and wait again.
        drafts: how many drafted tokens there is room for, behind all chunks together.
        states: of requests for which the model drafted: the states of all tokens of the chunk but the last one after the first
            loop, (1, tokens, [streams,] hidden). That loop does not run for them again.
    """

    chunks: list[Chunk] = field(default_factory=list)
    restores: list[tuple[Request, object]] = field(default_factory=list)
    snapshots: list[tuple[Request, SnapshotKey]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    drafts: int = 0
    states: dict[Request, Tensor] = field(default_factory=dict)
