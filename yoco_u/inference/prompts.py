"""Prompts as token ids."""

from yoco_u.data import DocumentEncoder
from yoco_u.errors import UserError


def prompt_tokens(prompt: str | list[int], encoder: DocumentEncoder | None, vocab_size: int) -> list[int]:
    """The tokens of a prompt.

    Args:
        prompt: a text, which begins a document, or token ids as they are.
        encoder: of texts; None where there is no tokenizer.
        vocab_size: of the model, which may have fewer tokens than the tokenizer.

    Raises:
        UserError: if it is no prompt, or has no tokens, or others than the model's.
    """
    tokens = _encoded(prompt, encoder) if isinstance(prompt, str) else prompt
    if not isinstance(tokens, (list, tuple)):
        raise UserError(f"a prompt is of type {type(prompt).__name__}; give a text or a list of token ids")
    if not tokens:
        raise UserError("the prompt is empty; give at least one token")
    for token in tokens:
        if type(token) is not int:
            raise UserError(f"token {token!r:.80} of the prompt is no whole number; give token ids")
        if not 0 <= token < vocab_size:
            raise UserError(f"token {token} of the prompt is not in the vocabulary of {vocab_size}")
    return list(tokens)


def _encoded(text: str, encoder: DocumentEncoder | None) -> list[int]:
    if encoder is None:
        raise UserError("the prompt is a text, but there is no tokenizer; give token ids")
    if not text:
        raise UserError("the prompt is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is no Unicode text: a lone surrogate at character {error.start}") from None
    tokens: list[int] = encoder.encode([text])[0].tolist()
    return tokens
