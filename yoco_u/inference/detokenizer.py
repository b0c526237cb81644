"""Text from tokens as they come: only whole characters, up to the first stop string, however tokens cut it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.tool_calls import CLOSE, OPEN

_INCOMPLETE = 3  # U+FFFD at the end of a text that may yet become one character: its first three bytes of four
_WINDOW = 32  # tokens that are decoded together at most
_CONTEXT = 8  # tokens of a prompt that the text behind it is decoded with, and some more if they begin within a character


class Detokenizer:
    """The text of one output.

    The texts of prompt and output, one behind the other, are the text of all their tokens: a first blank, which sentencepiece
    leaves out at the beginning of a text, is part of an output's first word, and a character that the prompt's tokens begin
    and the output's complete is part of the output, as a whole.

    A token that ends an output (the end token, one of `stop_token_ids`) is not part of the text: do not append it.

    Args:
        prompt: the tokens before the output; none if it is to be a text of its own.

    Attributes:
        stopped: the stop string that ended the text, None while there was none. The one that is complete first counts, of
            several complete at once the longest. One complete within the first `min_tokens` tokens does not count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer.backend_tokenizer
        shown = (OPEN, CLOSE) if params.tools is not None else ()
        self._hidden = _special_tokens(tokenizer).difference(shown) if params.skip_special_tokens else frozenset()
        self._stops = [_StopString(stop) for stop in params.stop]
        self._unstoppable = params.min_tokens  # tokens still to come before a stop string counts
        # The last tokens: those whose text is given out as a whole, then those of uncertain text.
        self._window, self._given = self._end_of(prompt)
        text, whole = self._text_of(self._window), self._text_of(self._window[: self._given])
        spoiled = not text.startswith(whole)
        self._known = whole if spoiled else text[: _certain(text)]  # what is given out of the window's text
        begun = self._text_of(self._window[self._given :]) if spoiled else text[len(self._known) :]
        self._prompts = len(begun)  # U+FFFD behind it that the prompt's text has, unless the output makes a character of them
        self._held = ""  # text that may be the beginning of a stop string
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All text that is safe to show: what `append` and `flush` have returned."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    @property
    def held_back(self) -> str:
        """Text that may yet become another character, as U+FFFD; what may be the beginning of a stop string does not count."""
        return self._own(self._text_of(self._window)[len(self._known) :])

    def append(self, token: int) -> str:
        """Take in the next token and return the new text that is safe to show, which is often empty."""
        if self.stopped is not None:
            return ""
        new = self._decode(token)
        self._unstoppable -= 1
        return self._show(new, stoppable=self._unstoppable < 0)

    def flush(self) -> str:
        """The text held back so far, with U+FFFD for bytes that make no character; call it once, when no token follows."""
        if self.stopped is not None:
            return ""
        rest = self._text_of(self._window)[len(self._known) :]
        self._known += rest
        shown = self._show(self._outputs(rest), stoppable=self._unstoppable < 0)
        self._shown.append(self._held)
        shown, self._held = shown + self._held, ""
        return shown

    def _decode(self, token: int) -> str:
        """The text that is certain with this token and was not before.

        The window holds the tokens of the text given out last, on which the text of the next ones can depend (sentencepiece
        leaves out a first blank), and the tokens after it.
        """
        if self._has_no_text(token):
            return ""
        self._window.append(token)
        text = self._text_of(self._window)
        if not text.startswith(self._known):
            # A byte spoils the characters before it, which are given out already (`<0xNN>` tokens of sentencepiece are decoded
            # run by run): go on from here.
            self._window, self._known, self._given = self._window[self._given :], "", 0
            text = self._text_of(self._window)
        certain = _certain(text)
        new = text[len(self._known) : certain]
        if new and certain == len(text):
            self._window = self._window[self._given :]
            self._given, self._known = len(self._window), self._text_of(self._window)
            return self._outputs(new)
        if new:
            self._known += new
            self._given = max(self._given, len(self._window) - _INCOMPLETE)
        if len(self._window) > _WINDOW:
            self._narrow(text)
        return self._outputs(new)

    def _outputs(self, new: str) -> str:
        """New text without the U+FFFD with which the prompt's text ends."""
        own = self._own(new)
        if own:
            self._prompts = 0
        else:
            self._prompts -= len(new)
        return own

    def _own(self, new: str) -> str:
        return new[self._prompts :] if new.startswith("\ufffd" * self._prompts) else new.lstrip("\ufffd")

    def _narrow(self, text: str) -> None:
        """Drop the older half of a window whose text is not certain for long, so that what is left ends the text as before.

        UTF-8 says at each byte whether a character begins there, so one of a few places is right.
        """
        held = len(text) - len(self._known)
        half = len(self._window) - _WINDOW // 2
        texts = {start: self._text_of(self._window[start:]) for start in range(half, half + _INCOMPLETE + 1)}
        start = next((start for start, rest in texts.items() if text.endswith(rest)), half)
        self._window, self._given = self._window[start:], max(0, self._given - start)
        self._known = texts[start][: max(0, len(texts[start]) - held)]

    def _end_of(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The last tokens of a prompt that have a text, from the beginning of a character on if it has one there.

        Returns:
            The tokens, and how many of them are before those of a character that the prompt begins and does not complete.
        """
        tokens = [token for token in prompt[-_WINDOW:] if not self._has_no_text(token)][-_CONTEXT - _INCOMPLETE :]
        ends = range(len(tokens), max(0, len(tokens) - _INCOMPLETE - 1), -1)
        for broken in ("\ufffd", ()):  # at the beginning, which not all texts are without
            for end in ends:
                for start in range(min(_INCOMPLETE + 1, end)):
                    text = self._text_of(tokens[start:end])
                    if not text.startswith(broken) and not text.endswith("\ufffd"):
                        return tokens[start:], end - start
        return tokens, max(0, len(tokens) - _INCOMPLETE)

    def _has_no_text(self, token: int) -> bool:
        piece = self._tokenizer.id_to_token(token)
        return piece is None or piece in self._hidden

    def _text_of(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _show(self, new: str, *, stoppable: bool) -> str:
        text = self._held + new
        for end, char in enumerate(new, len(self._held) + 1):
            complete = [stop.text for stop in self._stops if stop.ends_with(char)]
            if complete and stoppable:
                self.stopped = max(complete, key=len)
                text, held = text[: end - len(self.stopped)], 0
                break
        else:
            held = max((stop.begun for stop in self._stops), default=0)
        safe = len(text) - held
        text, self._held = text[:safe], text[safe:]
        self._shown.append(text)
        return text


def _certain(text: str) -> int:
    """How much of a text stays as it is, whatever follows."""
    return len(text) - min(_INCOMPLETE, len(text) - len(text.rstrip("\ufffd")))


class _StopString:
    """Looks for a string in a text that comes character by character, in constant time for each (Knuth, Morris, Pratt).

    Attributes:
        text: the string.
        begun: length of the longest beginning of the string, short of the whole, that the text ends with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.begun = text, 0
        self._borders = [0]  # for each beginning of the string: the longest shorter one that it ends with; as far as needed

    def ends_with(self, char: str) -> bool:
        """Take in the text's next character. Whether the text ends with the string now."""
        self.begun = self._longer(self.begun, char)
        if self.begun < len(self.text):
            return False
        self.begun = self._border(self.begun)
        return True

    def _longer(self, length: int, char: str) -> int:
        """The longest beginning that a text ends with which ended with one of `length`, and goes on with a character."""
        while length and self.text[length] != char:
            length = self._border(length)
        return length + (self.text[length] == char)

    def _border(self, length: int) -> int:
        while len(self._borders) < length:
            self._borders.append(self._longer(self._borders[-1], self.text[len(self._borders)]))
        return self._borders[length - 1]


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return frozenset(str(token.content) for token in added if token.special)
