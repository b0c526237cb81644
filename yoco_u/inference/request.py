"""One request: its tokens, how far they are computed, and the blocks and the seat that it holds."""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yoco_u.inference.sampling_params import SamplingParams


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Request:
    """What a user asked for, and its state in the engine. Only the scheduler changes it.

    Attributes:
        prompt: token ids, at least one.
        num_loops: T of this request; caches of another T are never shared with it.
        exit_threshold: of tokens that may leave the loop earlier, see `exits.py`; None where all run T loops. Caches of another
            threshold are never shared with it either.
        output: the tokens sampled so far.
        computed: leading tokens of prompt and output whose state is in the caches.
        unscored: the first prompt token whose log probability is asked for and not known yet; the prompt's length or more
            where there is none.
        blocks: the block table: block i holds the tokens from i * block_size on.
        written: keys and values before this position lie in shared blocks already, and must not be written again.
        seat: its place in the window rings and retention states while it runs.
        allocation: a number that no other request ever has, anew whenever its block table began anew or lost blocks at its
            end. While it stays, the table only grows.
        hashes: chain hashes of the leading full blocks, as far as they were needed.
        snapshot_at: positions in the prompt at which the window state is kept as a snapshot.
        decode_snapshot: key of the snapshot at the output's last block boundary, which the next boundary's replaces.
        finish_reason: "stop", "length", "abort" or "error".
    """

    id: str
    prompt: list[int]
    params: "SamplingParams"
    num_loops: int
    exit_threshold: float | None = None
    output: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    written: int = 0
    seat: int | None = None
    allocation: int = -1
    hashes: list[bytes] = field(default_factory=list)
    snapshot_at: tuple[int, ...] = ()
    decode_snapshot: bytes | None = None
    status: Status = Status.WAITING
    finish_reason: str | None = None
    unscored: int = field(init=False)

    def __post_init__(self) -> None:
        asked = self.params.prompt_logprobs is not None
        self.unscored = max(1, self.params.prompt_logprobs_start) if asked else len(self.prompt)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def scores(self) -> bool:
        """Whether log probabilities of the prompt are asked for and not all known yet."""
        return self.unscored < len(self.prompt)

    @property
    def num_needed(self) -> int:
        """How many tokens have to be computed. Without sampling the last one need not be: nobody asks what follows it."""
        return self.num_tokens if self.params.max_tokens else self.num_tokens - 1

    def token_slice(self, start: int, stop: int) -> list[int]:
        """`tokens[start:stop]` for 0 <= start <= stop, at the cost of the slice alone."""
        prompt = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - prompt, 0) : max(stop - prompt, 0)]
