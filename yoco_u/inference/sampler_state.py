"""What the sampler knows of one output: its tokens as far as penalties count them, its grammar, its random numbers."""

import secrets
from array import array
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from yoco_u.inference.constraints import Matcher
from yoco_u.inference.sampling_params import SamplingParams

_GREEDY = 1e-5  # lower temperatures count as 0: dividing logits by them would overflow float32


class SamplerState:
    """What the sampler knows of one output.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt's tokens, on which the repetition penalty falls too.
        index: which of the request's `n` outputs this is; outputs of one seed have different random numbers.
        eos_token_ids: the model's end tokens.
        matcher: at the beginning of the output's grammar, None without one.

    Attributes:
        stop_token_ids: the tokens that end this output.
        penalized: whether a penalty is set.
        failure: why the last `sample` gave None, in one line.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        index: int,
        eos_token_ids: Collection[int],
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.greedy = params.temperature < _GREEDY
        self.stop_token_ids = frozenset([*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)])
        self.failure: str | None = None
        self.num_tokens = 0
        repeated = params.repetition_penalty != 1.0
        self.penalized = repeated or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))} if repeated else {}
        self._tokens = array("q", self._places)
        self._counts = array("q", bytes(self._tokens.itemsize * len(self._tokens)))
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        self._uniforms: deque[float] = deque()  # of the next tokens, as far as they are drawn

    def append(self, token: int) -> None:
        """Take in the output's next token. `sample` calls this for the tokens that it chooses."""
        self.num_tokens += 1
        if self._uniforms:
            self._uniforms.popleft()
        if self.penalized:
            place = self._places.setdefault(token, len(self._tokens))
            if place == len(self._tokens):
                self._tokens.append(token)
                self._counts.append(0)
            self._counts[place] += 1
        if self.matcher is not None and token not in self.stop_token_ids:
            self.matcher.append(token)

    def uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) of the next token, or of the token so many places behind it; the same until `append`."""
        while len(self._uniforms) <= ahead:
            self._uniforms.append(float(self._random.random()))
        return self._uniforms[ahead]

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens that penalties fall on, and how often the output has each (0: only the prompt has it); (tokens,) int64.

        They are views, to be dropped before the next `append`.
        """
        return np.frombuffer(self._tokens, np.int64), np.frombuffer(self._counts, np.int64)

    @property
    def decided(self) -> bool:
        """Whether it is known which tokens may come next."""
        return self.matcher is None or self.matcher.decided

    @property
    def unfinished(self) -> bool:
        """Whether the output is shorter than `min_tokens`, so that no token may end it."""
        return self.num_tokens < self.params.min_tokens
