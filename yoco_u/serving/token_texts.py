"""The bytes, the text and the name of single tokens, as log probabilities report them."""

import functools
import re

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how vocabularies of SentencePiece write a single byte


class TokenTexts:
    """What single tokens stand for, also those that are only part of a character."""

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
        """The token's text, with U+FFFD in place of bytes that are no character."""
        return self.bytes(token).decode(errors="replace")

    def name(self, token: int) -> str:
        r"""The token's text, or `bytes:\xNN` if its bytes are no text; so tokens of different bytes have different names."""
        try:
            return self.bytes(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))
