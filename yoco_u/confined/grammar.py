"""The service that follows outputs through one grammar, with llguidance."""

import json
import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_LIMITS = LLParserLimits(verbose_errors=False)
# Text that must come next could otherwise come only in the tokens that the tokenizer makes of it; one of them may be an added
# token, such as `<think>`, which the grammar then finds to be no text.
_OPTIONS = '%llguidance {"no_forcing": true}'
_PLACE = re.compile(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?")  # line and column in a grammar of Lark


class Service:
    """Compiles a grammar, then says which tokens may come next in each of its outputs.

    The first message is `{"kind": ..., "text": ...}`, of the kind `regex`, `json_schema` or `lark`. Each further one is
    `[output, tokens]`: so many more tokens of an output, which is any number. Its answer has one bit a token of the vocabulary,
    from the lowest bit of the first byte on: whether that token may come next. With null for tokens the output is forgotten.

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
        matcher = LLMatcher(self._tokenizer, f"{_lark(kind, text)}\n{_OPTIONS}", log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            _mask(matcher)  # only now it is known whether any text fits
        _check(matcher, names_line=kind == "lark")
        return matcher


def _lark(kind: str, text: str) -> str:
    """The rules of a grammar in llguidance's form of Lark."""
    if kind == "json_schema":
        return f"start: %json {text}"
    if kind == "regex":
        return str(json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"])
    return text


def _mask(matcher: LLMatcher) -> bytes:
    bits = matcher.compute_bitmask()
    _check(matcher)
    return bits


def _check(matcher: LLMatcher, names_line: bool = False) -> None:
    """Raise the sentence that matters of the library's message, which may draw the place over several lines.

    Args:
        names_line: begin with `line N: `, if the library names one.
    """
    if not matcher.is_error():
        return
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        raise ValueError("no text fits it")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    place = _PLACE.match(message)
    said = next(iter(errors or lines), "").removeprefix(place[0] if place else "")
    raise ValueError(f"line {place[1]}: {said}" if place and names_line else said)
