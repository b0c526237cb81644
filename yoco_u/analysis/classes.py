"""Kinds of tokens, by the characters they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

NAMES = ("word", "number", "symbol", "space", "part of a character", "special")


@dataclass(frozen=True)
class TokenClasses:
    """
    Attributes:
        names: of the classes.
        of: class of each token, (vocab,).
    """

    names: tuple[str, ...]
    of: Tensor


def token_classes(tokenizer: PreTrainedTokenizerFast) -> TokenClasses:
    """Tokens by what they hold: a letter, else a digit, else another visible character, else only space.

    `part of a character`: bytes that are no text by themselves. `special`: the end of a text, and whatever else the tokenizer
    keeps apart.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    kinds = ["special" if token in special else _kind(text) for token, text in enumerate(texts)]
    return TokenClasses(NAMES, torch.tensor([NAMES.index(kind) for kind in kinds]))


def _kind(text: str) -> str:
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "part of a character"
    for kind, holds in (("word", str.isalpha), ("number", str.isdigit)):
        if any(map(holds, text)):
            return kind
    return "symbol" if text.strip() else "space"
