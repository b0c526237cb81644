"""The service that follows outputs through one grammar, with llguidance."""

import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_LIMITS = LLParserLimits(verbose_errors=False)


class Service:
    """Compiles a grammar, then says which tokens may come next in each of its outputs.

    The first message is `{"kind": "regex" or "json_schema", "text": ...}`. Each further one is `[output, tokens]`: so many more
    tokens of an output, which is any number. Its answer has one bit a token of the vocabulary, from the lowest bit of the first
    byte on: whether that token may come next. With null for tokens the output is forgotten.

    Args:
        tokenizer: as the tokenizers library writes it.
        vocab_size: tokens of the model.
        eos_token_ids: the tokens that end an output.

    Raises:
        ValueError: if llguidance cannot use the tokenizer.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_token_ids)
        except ValueError as error:
            raise ValueError(f"grammars cannot be used with this tokenizer: {error}") from None
        self._compiled: LLMatcher | None = None
        self._outputs: dict[int, LLMatcher] = {}

    def __call__(self, message: bytes) -> bytes:
        if self._compiled is None:
            self._compiled = self._compile(**json.loads(message))
            return b""
        output, tokens = json.loads(message)
        if tokens is None:
            self._outputs.pop(output, None)
            return b""
        matcher = self._outputs.get(output)
        if matcher is None:
            matcher = self._outputs[output] = self._compiled.deep_copy()
        matcher.consume_tokens(tokens)
        return _mask(matcher)

    def _compile(self, kind: str, text: str) -> LLMatcher:
        grammar = LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_json_schema(text)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            _mask(matcher)  # only now it is known whether any text fits
        _check(matcher)
        return matcher


def _mask(matcher: LLMatcher) -> bytes:
    bits = matcher.compute_bitmask()
    _check(matcher)
    return bits


def _check(matcher: LLMatcher) -> None:
    """Raise the sentence that matters of the library's message, which may draw the place over several lines."""
    if not matcher.is_error():
        return
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        raise ValueError("no text fits it")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    raise ValueError(next(iter(errors or lines), ""))
