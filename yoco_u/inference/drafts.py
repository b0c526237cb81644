"""Drafts: what may follow an output, and how many tokens of it are worth verifying.

A draft that is right saves a step; one that is wrong costs the time in which it was made and verified. Both are measured while
the engine runs, so what is drafted fits the machine, the batch and the text. Tokens do not depend on it.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from statistics import median
from typing import Literal

from yoco_u.inference.request import Request

Drafting = Literal["none", "loops", "prompt"]
"""Where drafts come from: the model's first loop and cross-decoder, or what stood behind the same tokens before."""

LONGEST = 16
"""Most tokens of one draft."""

_NGRAMS = (3, 2)  # tokens that must have stood there before, the longer first
_BYTES = array("i").itemsize
_HOPE = 0.7  # of a draft's token to be right, before any was verified
_NEW, _NEW_USUAL = 0.15, 0.1  # weight of the newest token in a moving average: an output's, and that of all outputs
_PASS, _TOKEN = 0.5, 0.1  # of the time of a plain step, that a pass of drafting and a token more take, before any was measured
_LEAST = 0.02  # of that time, that a token more takes at least, as differences of times that vary may be nothing
_WORTH = 1.03  # times the speed of plain decoding that drafts must promise
_TIMES = 7  # times of which the median counts
_TRIALS = 0.02  # share of the time, where drafts do not seem worth it, in which they are tried
_TRIAL = 2  # tokens of such a draft
_DEAREST = 8  # plain steps that a trial counts for at most, however long the machine was held up
_SPELL = 64  # steps with drafts, after which a plain one is timed again


class PromptDrafts:
    """Looks up what stood behind the last tokens of a text when they came before (prompt lookup decoding).

    The text is searched anew for each draft, which takes about 1 ms for a million tokens, and four bytes a token. An index of
    its n-grams would take hundreds of bytes a token, and hold up everybody when it is made for the first draft.
    """

    def __init__(self) -> None:
        self._text = bytearray()  # of tokens of `_BYTES` bytes each

    @property
    def known(self) -> int:
        """How many tokens of the text were given."""
        return len(self._text) // _BYTES

    def extend(self, tokens: list[int]) -> None:
        """Take in the next tokens of the text."""
        self._text += array("i", tokens).tobytes()

    def next(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none where the last ones are new."""
        for size in _NGRAMS:
            at = self._behind(size)
            if at is not None:
                found = array("i", bytes(self._text[at * _BYTES : (at + count) * _BYTES])).tolist()
                while len(found) < count:  # it goes on with what is drafted: a repetition
                    found.append(found[at + len(found) - self.known])
                return found
        return []

    def _behind(self, size: int) -> int | None:
        """Where the text went on when its last `size` tokens came before for the last time."""
        if self.known <= size:
            return None
        last = self._text[-size * _BYTES :]
        at = self._text.rfind(last, 0, -_BYTES)
        while at > 0 and at % _BYTES:  # bytes of several tokens
            at = self._text.rfind(last, 0, at + len(last) - 1)
        return at // _BYTES + size if at >= 0 else None


class Acceptance:
    """How likely the next token of a draft is right, as a moving average over those that were verified."""

    def __init__(self, rate: float = _HOPE, weight: float = _NEW_USUAL) -> None:
        self.rate, self._weight = rate, weight

    def own(self) -> "Acceptance":
        """That of a new output, which begins with the usual one and follows its own tokens faster."""
        return Acceptance(self.rate, _NEW)

    def take(self, accepted: int, rejected: bool) -> None:
        """Take in a draft: how many of its tokens were right, and whether one was wrong."""
        for right in [1] * accepted + [0] * rejected:
            self.rate += self._weight * (right - self.rate)


class Drafter:
    """How the tokens of one output are drafted.

    Args:
        acceptance: with which it begins.

    Attributes:
        lookup: where drafts are looked up; None if the model drafts.
    """

    def __init__(self, by: Drafting, acceptance: Acceptance) -> None:
        self.by, self.acceptance = by, acceptance
        self.lookup = PromptDrafts() if by == "prompt" else None

    def looked_up(self, request: Request, count: int) -> list[int]:
        """At most `count` drafted tokens."""
        assert self.lookup is not None
        self.lookup.extend(request.token_slice(self.lookup.known, request.num_tokens))
        return self.lookup.next(count)


def gain(rate: float, length: int) -> float:
    """Tokens of a draft that are accepted on average, if each is right with this probability when all before it are."""
    return length if rate >= 1 else rate * (1 - rate**length) / (1 - rate)


@dataclass(frozen=True)
class Candidate:
    """A request for which tokens may be drafted.

    Attributes:
        by_loops: whether the model drafts.
        rate: of acceptance.
        most: tokens that can be drafted.
    """

    by_loops: bool
    rate: float
    most: int


@dataclass(frozen=True)
class StepTime:
    """What a step took that has decodes alone.

    Attributes:
        decodes: how many.
        passes: of drafting.
        tokens: drafted, over all requests.
        drafting, seconds: seconds of the passes, and of the whole step.
    """

    decodes: int
    passes: int
    tokens: int
    drafting: float
    seconds: float


class DraftLengths:
    """Chooses the lengths of a step's drafts for the most tokens a second.

    A step with drafts takes the time of a plain one, that of each pass of drafting, and what it takes longer to verify so many
    drafted tokens. All three are measured, by the number of decodes, the kind of drafts and the number of drafted tokens, each
    up to a factor of two. Now and then a short draft is tried although it does not seem worth it, or a plain step is taken
    although drafts do, so that the times and the rates of acceptance stay true.
    """

    def __init__(self) -> None:
        self._times: dict[tuple[str, int, int], deque[float]] = {}  # by kind, number of decodes and of drafted tokens
        self._medians: dict[tuple[str, int], dict[int, float]] = {}  # of these, by the number of drafted tokens
        self._spare = 0.0  # seconds that may be spent on trials
        self._on_trial = False  # whether the step that runs is a trial,
        self._too_dear = False  # or would be one if there were the seconds for it
        self._spell = 0  # steps with drafts since the last plain one

    def choose(self, decodes: int, candidates: Sequence[Candidate]) -> list[int]:
        """The length of each candidate's draft, 0 for none, in a step of so many decodes."""
        plain = self._time("plain", decodes)
        self._on_trial = self._too_dear = False
        if plain is None or self._spell >= _SPELL:
            return [0] * len(candidates)
        kind = "loops" if any(one.by_loops for one in candidates) else "prompt"
        a_pass = self._time("pass", decodes) or plain * _PASS

        def seconds(lengths: Sequence[int]) -> float:
            passes = max((length for length, one in zip(lengths, candidates, strict=True) if one.by_loops), default=0)
            return plain + passes * a_pass + self._more(kind, decodes, sum(lengths))

        every = sum(one.most for one in candidates)
        cost = self._more(kind, decodes, every) / max(1, every) * decodes / plain
        most = [min(one.most, _worth(one.rate, cost)) for one in candidates]
        best, speed = [0] * len(candidates), _WORTH * decodes / plain
        for longest in range(1, max(most) + 1):
            lengths = [min(longest, own) for own in most]
            tokens = decodes + sum(gain(one.rate, length) for one, length in zip(candidates, lengths, strict=True))
            if tokens / seconds(lengths) > speed:
                best, speed = lengths, tokens / seconds(lengths)
        trial = [min(_TRIAL, one.most) for one in candidates]
        if not any(best) and any(trial):
            self._on_trial = seconds(trial) - plain <= self._spare
            self._too_dear = not self._on_trial
        return trial if self._on_trial else best

    def take(self, time: StepTime) -> None:
        """Take in what a step took."""
        on_trial, too_dear = self._on_trial, self._too_dear
        self._on_trial = self._too_dear = False  # nothing need be chosen in the next step
        if not time.tokens:
            self._add("plain", time.decodes, 0, time.seconds)
            self._spare += _TRIALS * time.seconds if too_dear else 0.0
            self._spell = 0
            return
        self._spell += 1
        if time.passes:
            self._add("pass", time.decodes, 0, time.drafting / time.passes)
        plain = self._time("plain", time.decodes)
        if plain is not None:
            more = time.seconds - time.drafting - plain
            self._add("loops" if time.passes else "prompt", time.decodes, time.tokens, more)
            if on_trial:
                self._spare -= min(time.seconds - plain, _DEAREST * plain)

    def _more(self, kind: str, decodes: int, tokens: int) -> float:
        """Seconds that a step with so many drafted tokens takes longer than a plain one, drafting aside."""
        plain = self._time("plain", decodes) or 0.0
        known, size = self._medians.get((kind, decodes.bit_length())), tokens.bit_length()
        if known is None:
            return _TOKEN * plain * tokens / decodes
        nearest = min(known, key=lambda one: (abs(one - size), one))
        return max(known[nearest] * 2.0 ** max(0, size - nearest), _LEAST * plain * tokens / decodes)

    def _add(self, what: str, decodes: int, tokens: int, seconds: float) -> None:
        key = what, decodes.bit_length(), tokens.bit_length()
        times = self._times.setdefault(key, deque(maxlen=_TIMES))
        times.append(seconds)
        self._medians.setdefault(key[:2], {})[key[2]] = median(times)

    def _time(self, what: str, decodes: int) -> float | None:
        return self._medians.get((what, decodes.bit_length()), {}).get(0)


class FixedLengths(DraftLengths):
    """Drafts of one length in every step, as far as there is room, for measurements that no time may change."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def choose(self, decodes: int, candidates: Sequence[Candidate]) -> list[int]:
        return [min(self.length, one.most) for one in candidates]

    def take(self, time: StepTime) -> None:
        pass


def _worth(rate: float, cost: float) -> int:
    """How many tokens of a draft are worth verifying, each of which costs as much time as so many sampled tokens."""
    if rate <= cost:
        return 0
    return LONGEST if cost <= 0 or rate >= 1 else min(LONGEST, int(log(cost) / log(rate)))
