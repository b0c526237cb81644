"""One output while it runs: everything that its tokens go through between the model and whoever reads it."""

import math
from dataclasses import dataclass

from torch import Tensor

from yoco_u.device import upload
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.inference.drafts import Drafter
from yoco_u.inference.logprobs import score
from yoco_u.inference.outputs import Completion, RequestOutput, TokenLogprobs, Update
from yoco_u.inference.request import Request
from yoco_u.inference.sampler import Sampled
from yoco_u.inference.sampler_state import SamplerState


@dataclass(eq=False)
class RunningOutput:
    """One output while it runs.

    Attributes:
        request: what the scheduler sees of it.
        completion: what the user sees of it.
        parent: the user's request, of which this is one of `n` outputs.
        drafter: how its tokens are drafted; None if they are not.
        loops: how many loops the token ran from whose state the next one is chosen.
        started: whether it was in a step.
    """

    request: Request
    sampler: SamplerState
    detokenizer: Detokenizer | None
    completion: Completion
    parent: RequestOutput
    drafter: Drafter | None = None
    loops: int = 0
    started: bool = False

    def start(self, cached: int) -> None:
        """The output is in a step, whose tokens before `cached` were in the prefix cache when it is the output's first."""
        if self.started:
            return
        self.started = True
        self.completion.cached_tokens = cached
        if self.sampler.matcher is not None:
            self.sampler.matcher.ask()

    def score(self, end: int, logits: Tensor) -> bool:
        """Take in the log-probabilities of prompt tokens.

        Args:
            end: the position behind the last one.
            logits: of the last positions before it, (positions, vocab).

        Returns:
            Whether they are numbers; nothing is taken in if the logits hold NaN or plus infinity, or minus infinity alone.
        """
        found, top = self.parent.prompt_logprobs, self.request.params.prompt_logprobs
        assert found is not None and top is not None
        targets = self.request.prompt[end - len(logits) + 1 : end + 1]
        scored = score(logits[: len(targets)], upload(targets, logits.device), top) if targets else []
        if any(math.isnan(chosen.logprob) for chosen, _ in scored):
            return False
        found += [TokenLogprobs(*one) for one in scored]
        return True

    def take(self, sampled: Sampled) -> tuple[str, str | None]:
        """Take in the next token.

        Returns:
            The new text, and the finish reason if this token is the last one.
        """
        completion, token = self.completion, sampled.token
        completion.token_ids.append(token)
        completion.loops.append(self.loops)
        if completion.logprobs is not None:
            assert sampled.logprob is not None
            completion.logprobs.append(TokenLogprobs(sampled.logprob, sampled.top))
        if token in self.sampler.stop_token_ids:
            completion.stop_reason = token
            return "", "stop"
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.append(token)
            completion.text += text
            if self.detokenizer.stopped is not None:
                completion.stop_reason = self.detokenizer.stopped
                return text, "stop"
        return text, "length" if len(completion.token_ids) == self.request.params.max_tokens else None

    def flush(self) -> str:
        """The text that was held back, when no token follows, up to a stop string that is complete only now."""
        if self.detokenizer is None:
            return ""
        text = self.detokenizer.flush()
        self.completion.text += text
        if self.detokenizer.stopped is not None:
            self.completion.stop_reason = self.detokenizer.stopped
        return text

    def ended(self, reason: str, tokens: list[int], text: str) -> Update:
        """The last update."""
        if self.sampler.matcher is not None:
            self.sampler.matcher.close()
        self.completion.finish_reason = reason
        return Update(self.parent, self.completion, text, tokens, reason)
