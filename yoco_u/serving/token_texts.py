"""The bytes and the text of single tokens, and log probabilities with them."""

import functools
import re

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from yoco_u.inference import Logprob, SamplingParams, TokenLogprobs
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.serving.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte in the vocabularies of sentencepiece


class TokenTexts:
    """What single tokens stand for, whole characters or not."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._special = {int(token): str(piece.content) for token, piece in tokenizer.added_tokens_decoder.items()}
        is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
        self._alphabet = {char: byte for byte, char in bytes_to_unicode().items()} if is_byte_level else {}
        self.bytes = functools.lru_cache(maxsize=2**17)(self._bytes)

    def _bytes(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        piece = self.tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:
            return b""  # a row of the embedding that the tokenizer has no token for
        if all(char in self._alphabet for char in piece):
            return bytes(self._alphabet[char] for char in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return str(piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")).encode()

    def text(self, token: int) -> str:
        """The token's text; U+FFFD stands for bytes that are no character."""
        return self.bytes(token).decode(errors="replace")

    def name(self, token: int) -> str:
        r"""The token's text, or `bytes:\xNN` where it is none, so that no two tokens of other bytes are called alike."""
        try:
            return self.bytes(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))


class CompletionLogprobWriter:
    """Log probabilities of one output, as completions report them; it knows where in the text each token begins."""

    def __init__(self, texts: TokenTexts, params: SamplingParams) -> None:
        self._texts = texts
        self._decoder = Detokenizer(texts.tokenizer, SamplingParams(skip_special_tokens=params.skip_special_tokens))
        self._offset = 0

    def write(self, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> CompletionLogprobs:
        """Of the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.append(token))
        return CompletionLogprobs(
            tokens=[self._texts.name(token) for token in tokens],
            token_logprobs=[one.chosen.logprob if one is not None else None for one in logprobs],
            top_logprobs=[self._top(one) if one is not None else None for one in logprobs],
            text_offset=offsets,
        )

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in (*logprobs.top, logprobs.chosen):  # the likelier one of tokens that look the same stays
            found.setdefault(self._texts.name(one.token_id), one.logprob)
        return found


def chat_logprobs(texts: TokenTexts, logprobs: list[TokenLogprobs]) -> ChatLogprobs:
    """Log probabilities as chats report them."""

    def entry(one: Logprob) -> TopLogprob:
        return TopLogprob(token=texts.text(one.token_id), logprob=one.logprob, bytes=list(texts.bytes(one.token_id)))

    return ChatLogprobs(
        content=[
            ChatLogprob(**entry(one.chosen).model_dump(), top_logprobs=[entry(top) for top in one.top]) for one in logprobs
        ]
    )
