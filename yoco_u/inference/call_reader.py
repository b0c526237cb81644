"""The calls of tools in an output, read from its text as it comes."""

import re
from dataclasses import dataclass

from yoco_u.inference.tool_calls import CLOSE, OPEN

_HEAD = re.compile(r'\s*\{"name": "([^"]*)", "arguments": ')
_END = "}\n" + CLOSE  # no JSON has it: a line does not end within a string, and a tag is none outside of one


@dataclass(frozen=True)
class CallPiece:
    """A part of a call.

    Attributes:
        index: which of the output's calls.
        name: the tool, in the first part of the call; None in all others.
        arguments: the next part of the arguments, as JSON text.
    """

    index: int
    name: str | None
    arguments: str


class CallReader:
    """Divides the text of one output, whose grammar is that of `ToolCalls`, into what is said and the calls.

    White space between the text and the first call belongs to neither. However the text is cut, the parts add up to the same.
    Where the output ends too soon, the beginning of a first opening tag is text, and a call whose arguments have not begun is
    left out.

    Args:
        required: whether the output has calls alone.
        is_json: whether an output without calls is JSON, in whose strings tags mean nothing.
    """

    def __init__(self, required: bool, is_json: bool = False) -> None:
        self._held = ""
        self._read = self._between if required else self._json_or_calls if is_json else self._text
        self._calls = 0

    @property
    def complete(self) -> bool:
        """Whether there is a call, and the last one has ended."""
        return self._calls > 0 and self._read == self._between

    def append(self, text: str, last: bool) -> list[str | CallPiece]:
        """Take in the next text.

        Args:
            last: whether no text follows.

        Returns:
            What is certain now: pieces of text, and of calls.
        """
        self._held += text
        found: list[str | CallPiece] = []
        while self._read(found):
            pass
        if last and self._held and self._read in (self._text, self._json_or_calls):
            found.append(self._held)
        return found

    # Each of these reads what is held as far as it can, and returns whether another one is to go on behind it.

    def _json_or_calls(self, found: list[str | CallPiece]) -> bool:
        if begun := self._held.lstrip():  # no JSON begins as a tag does
            self._read = self._text if begun[0] == OPEN[0] else self._all
        return bool(begun)

    def _all(self, found: list[str | CallPiece]) -> bool:
        if self._held:
            found.append(self._held)
        self._held = ""
        return False

    def _text(self, found: list[str | CallPiece]) -> bool:
        text, tag, rest = self._held.partition(OPEN)
        certain = (text if tag else text[: len(text) - _begun(text, OPEN)]).rstrip()
        if certain:
            found.append(certain)
        self._held = rest if tag else text[len(certain) :]
        if tag:
            self._read = self._head
        return bool(tag)

    def _head(self, found: list[str | CallPiece]) -> bool:
        head = _HEAD.match(self._held)
        if head is None:
            return False
        found.append(CallPiece(self._calls, head[1], ""))
        self._calls += 1
        self._held = self._held[head.end() :]
        self._read = self._arguments
        return True

    def _arguments(self, found: list[str | CallPiece]) -> bool:
        text, end, rest = self._held.partition(_END)
        certain = text if end else text[: len(text) - _begun(text, _END)]
        if certain:
            found.append(CallPiece(self._calls - 1, None, certain))
        self._held = rest if end else text[len(certain) :]
        if end:
            self._read = self._between
        return bool(end)

    def _between(self, found: list[str | CallPiece]) -> bool:
        text, tag, rest = self._held.partition(OPEN)
        self._held = rest if tag else text[len(text) - _begun(text, OPEN) :]
        if tag:
            self._read = self._head
        return bool(tag)


def _begun(text: str, tag: str) -> int:
    """The length of the longest beginning of a tag, short of the whole, that the text ends with."""
    return next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)
