"""Grammars: which tokens may come next so that the output fits a JSON schema or a regular expression, through llguidance."""

import functools
import json
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from yoco_u.data import vocabulary_size
from yoco_u.errors import UserError
from yoco_u.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Matcher:
    """The state of one output in its grammar."""

    def __init__(self, state: "LLMatcher", vocab_size: int) -> None:
        self._state = state
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        """(vocab,) bool: the tokens that may come next, an end token only where the grammar accepts the output.

        All false if the grammar became too complex to follow; `error` then says so.
        """
        bits = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        if self._state.is_error():
            return torch.zeros(self._vocab_size, dtype=torch.bool)
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))

    def append(self, token: int) -> None:
        """Take in the next token, which must be an allowed one."""
        taken = self._state.consume_token(token)
        assert taken, f"token {token} does not fit the grammar: {self.error}"

    @property
    def accepting(self) -> bool:
        """Whether the output may end here."""
        return self._state.is_accepting()

    @property
    def error(self) -> str:
        """Why no token is allowed, in one line; empty while all is well."""
        return _one_line(self._state.get_error())


class GrammarCompiler:
    """Compiles the grammars of requests for one tokenizer, each once.

    Args:
        tokenizer: a fast tokenizer whose tokens are bytes or characters of the text.
        vocab_size: columns of the logits; at least the tokenizer's vocabulary. Tokens that it lacks are never allowed.
        eos_token_ids: the tokens that end an output.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiled = functools.lru_cache(maxsize=128)(self._compile)

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """A fresh matcher at the beginning of an output; None if the request has no grammar.

        Raises:
            UserError: if llguidance is not installed, cannot read the tokenizer, or refuses the schema or the expression.
        """
        if params.json_schema is not None:
            compiled = self._compiled("json_schema", json.dumps(params.json_schema))
        elif params.regex is not None:
            compiled = self._compiled("regex", params.regex)
        else:
            return None
        return Matcher(compiled.deep_copy(), self._vocab_size)

    def _compile(self, kind: str, text: str) -> "LLMatcher":
        tokenizer = self._tokenizer
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_json_schema(text)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # only now it is known whether any text fits
        if matcher.is_error():
            raise UserError(f"{kind} {_shortened(text)}: {_one_line(matcher.get_error())}")
        return matcher

    @functools.cached_property
    def _tokenizer(self) -> "LLTokenizer":
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise UserError("json_schema and regex need llguidance: pip install 'yoco-u[structured]'") from None
        if vocabulary_size(self._hf_tokenizer) > len(self._hf_tokenizer):  # llguidance counts tokens, not ids
            raise UserError("json_schema and regex cannot be used with this tokenizer: its token ids have gaps")
        try:
            return from_tokenizer(self._hf_tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except ValueError as error:
            raise UserError(f"json_schema and regex cannot be used with this tokenizer: {_one_line(str(error))}") from None


def _one_line(message: str) -> str:
    """The sentence that matters of the library's message, which may draw the place over several lines."""
    if message.startswith("NoExtension"):
        return "no text fits it"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return next(iter(errors or lines), "")


def _shortened(text: str, longest: int = 80) -> str:
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")
