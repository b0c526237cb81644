"""Followers: confined processes that follow outputs through grammars, one a grammar.

A follower is a cache: where it has ended, another one follows its outputs again from their first tokens.
"""

import json
from collections import deque

from yoco_u.confined.nursery import Confined, Ended, Refused


class Followed:
    """One output, as its grammar sees it.

    Attributes:
        tokens: those of the output so far.
        mask: the bits of the tokens that may come next, None while they are not known.
        error: why no mask will come, in one line; empty while all is well.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.mask: bytes | None = None
        self.error = ""


class Follower:
    """A confined process, and the outputs that it follows through one grammar. It is used by one thread at a time.

    Args:
        confined: a fresh process with the service of `yoco_u/confined/grammar.py`.
        grammar: the message that the service compiles.

    Attributes:
        confined: the process.
        compiled: whether the grammar is known to compile.
    """

    def __init__(self, confined: Confined, grammar: bytes) -> None:
        self.confined, self.compiled = confined, False
        self._known: dict[Followed, int] = {}  # how many tokens of an output the process knows
        self._waiting: deque[Followed | None] = deque([None])  # for answers; the first says that the grammar compiles
        confined.ask(grammar)

    @property
    def ended(self) -> bool:
        """Whether the process has ended, or is the parent's of a process that was forked."""
        return self.confined.closed

    @property
    def idle(self) -> bool:
        """Whether no output needs the process."""
        return not self._known

    def ask(self, output: Followed) -> None:
        """Ask for the mask behind the tokens of an output."""
        new = output.tokens[self._known.get(output, 0) :]
        self._known[output] = len(output.tokens)
        self._tell(output, [id(output), new])

    def forget(self, output: Followed) -> None:
        """Follow an output no longer."""
        if self._known.pop(output, None) is None or self.ended:
            return
        self._tell(None, [id(output), None])
        while not self.ended and self.take():  # nobody may be left to take what the process has answered
            pass

    def take(self) -> bool:
        """Give the next answer, if it is there, to the output that waits for it.

        If the process has ended, the output that it was at has an error from then on; others have neither error nor mask.

        Returns:
            Whether there was one, or the process has ended.
        """
        try:
            answer = self.confined.take()
        except Refused as refusal:
            self._fail(str(refusal))
        except Ended as end:
            self._fail(str(end))
            self.end()
        else:
            if answer is None:
                return False
            self.compiled = True
            if (output := self._waiting.popleft()) is not None:
                output.mask = answer
        return True

    def compile(self) -> None:
        """Wait until the grammar is compiled.

        Raises:
            Refused, Ended: if it cannot be.
        """
        self.confined.answer()
        self._waiting.popleft()
        self.compiled = True

    def end(self) -> None:
        """End the process."""
        self.confined.close()

    def _tell(self, output: Followed | None, message: list[object]) -> None:
        """Send a message whose answer is the mask of an output."""
        self._waiting.append(output)
        self.confined.ask(json.dumps(message).encode())

    def _fail(self, error: str) -> None:
        """Let the output whose answer comes next have an error, or all outputs if the grammar does not compile."""
        failed = [self._waiting.popleft()] if self.compiled and self._waiting else list(self._waiting)
        for output in failed:
            if output is not None:
                output.error = error
        if not self.compiled:
            self.end()
