"""What the engine returns: requests with their outputs, and what each step adds to them."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from yoco_u.errors import UserError
from yoco_u.inference.logprobs import Logprob

_LOGPROB = struct.Struct("<idi")  # a token, its log-probability, its rank


class TokenLogprobs:
    """The log-probability of one token, and those of the likeliest tokens in its place; see `SamplingParams.logprobs`.

    Long prompts have very many, so they are kept as bytes, a tenth of what Python's objects take.
    """

    __slots__ = ("_packed",)

    def __init__(self, chosen: Logprob, top: tuple[Logprob, ...]) -> None:
        self._packed = b"".join(_LOGPROB.pack(one.token_id, one.logprob, one.rank) for one in (chosen, *top))

    @property
    def chosen(self) -> Logprob:
        return Logprob(*_LOGPROB.unpack_from(self._packed))

    @property
    def top(self) -> tuple[Logprob, ...]:
        return tuple(Logprob(*one) for one in _LOGPROB.iter_unpack(self._packed[_LOGPROB.size :]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenLogprobs) and self._packed == other._packed

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"TokenLogprobs(chosen={self.chosen}, top={self.top})"


@dataclass
class Completion:
    """One output of a request, growing until it has a finish reason.

    Attributes:
        index: which of the request's `n` outputs this is.
        text: without the stop string or end token; empty without a tokenizer.
        token_ids: all sampled tokens, the end token included.
        loops: of each token, how many loops the token before it ran, from whose state it was chosen.
        logprobs: one a token, if asked for.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: the stop string or the token that ended it.
        cached_tokens: prompt tokens that were not computed again because an earlier request or output had.
        accepted_drafts, rejected_drafts: tokens drafted for it that became part of it, and those that did not.
        error: what went wrong, in one line, where the finish reason is "error".
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    error: str | None = None


@dataclass
class RequestOutput:
    """One request and its outputs so far.

    Attributes:
        prompt: the text as it was given; None if the request came as tokens.
        prompt_logprobs: if asked for, one entry for each prompt token; None for the first token, and for those before
            `prompt_logprobs_start`.
        num_loops: T; the most loops that a token runs, where tokens leave the loop.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    num_loops: int
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def cached_tokens(self) -> int:
        """The `cached_tokens` of all outputs together."""
        return sum(output.cached_tokens for output in self.outputs)

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def scored(self) -> list[TokenLogprobs]:
        """The entries of `prompt_logprobs` that are not None, in order."""
        return [one for one in self.prompt_logprobs or () if one is not None]


@dataclass(frozen=True)
class Update:
    """What one step added to one output of a request.

    Attributes:
        text: new text, often empty while a character or a possible stop string is incomplete.
        token_ids: new tokens; more than one where drafts were accepted.
        finish_reason: of the output's last update, None in all others.
    """

    request: RequestOutput
    output: Completion
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


def joined(updates: Iterable[Update]) -> list[Update]:
    """One update for each output, of all that was added to it in one step."""
    found: dict[int, Update] = {}
    for new in updates:
        if (old := found.get(id(new.output))) is not None:
            new = replace(new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids)
        found[id(new.output)] = new
    return list(found.values())


BROKEN_LOGITS = "the model's logits hold NaN or infinity"
"""The `error` of an output for which the model computed no numbers."""

NO_TOKEN = "no token may come next"
"""How the `error` of an output begins for which its own request, by its grammar say, left no token to choose."""


def check_outputs(requests: Iterable[RequestOutput]) -> None:
    """Fail if an output of one of the requests has failed.

    Raises:
        UserError: with the first error, if there is one.
    """
    for request in requests:
        for output in request.outputs:
            if output.error is not None:
                raise failed_output(output.error)


def failed_output(error: str) -> UserError:
    """The error to raise for an output that ended with an `error`."""
    advice = "; the model may be damaged, or its dtype too coarse for it: try float32" if error == BROKEN_LOGITS else ""
    return UserError(error + advice)
