"""Text from tokens as they come: only whole characters, up to the first stop string, however tokens cut it."""

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from yoco_u.inference.sampling_params import SamplingParams


class Detokenizer:
    """The text of one output.

    A token that ends an output (the end token, one of `stop_token_ids`) is not part of the text: do not append it.

    Attributes:
        stopped: the stop string that ended the text, None while there was none. The one that is complete first counts, of
            several complete at once the longest. One complete within the first `min_tokens` tokens does not count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, params: SamplingParams) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer.backend_tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._stops = params.stop
        self._unstoppable = params.min_tokens  # tokens still to come before a stop string counts
        self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
        self._undecoded: list[int] = []  # tokens whose last character is not complete
        self._held = ""  # text that may be the beginning of a stop string
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All text that is safe to show: what `append` and `flush` have returned."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

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
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=self._skip_special_tokens)
        self._undecoded = []
        shown = self._show(rest, stoppable=self._unstoppable < 0)
        self._shown.append(self._held)
        shown, self._held = shown + self._held, ""
        return shown

    def _decode(self, token: int) -> str:
        self._undecoded.append(token)
        try:
            new = self._stream.step(self._tokenizer, token)
        except Exception:
            # A byte may spoil the characters before it, which are shown already (`<0xNN>` tokens of sentencepiece are
            # decoded run by run): go on from here.
            new = self._tokenizer.decode(self._undecoded, skip_special_tokens=self._skip_special_tokens)
            self._stream = DecodeStream(self._undecoded, self._skip_special_tokens)
        if new is None:
            return ""
        self._undecoded = []
        return str(new)

    def _show(self, new: str, *, stoppable: bool) -> str:
        text = self._held + new
        if stoppable and (found := self._first_stop(text, len(self._held))):
            self.stopped, end = found
            text = text[: end - len(self.stopped)]
            self._held = ""
        else:
            safe = len(text) - self._may_become_stop(text)
            text, self._held = text[:safe], text[safe:]
        self._shown.append(text)
        return text

    def _first_stop(self, text: str, seen: int) -> tuple[str, int] | None:
        """The stop string whose end comes first after `seen` characters, and that end."""
        starts = ((stop, text.find(stop, max(0, seen - len(stop) + 1))) for stop in self._stops)
        ends = [(stop, start + len(stop)) for stop, start in starts if start >= 0]
        return min(ends, key=lambda found: (found[1], -len(found[0])), default=None)

    def _may_become_stop(self, text: str) -> int:
        """Characters of the longest end of the text that a stop string begins with, without being it."""
        lengths = (
            length
            for stop in self._stops
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(lengths, default=0)
