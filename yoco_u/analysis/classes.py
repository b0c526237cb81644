"""Groups of tokens: by the characters they stand for, and by their loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from yoco_u.data import vocabulary_size

NAMES = ("word", "number", "symbol", "space", "part of a character", "special")


Group = tuple[str, Tensor]
"""The name of a group, and which tokens are in it, (tokens,) bool."""

_QUARTERS = ("lowest loss", "low loss", "high loss", "highest loss")


@dataclass(frozen=True)
class TokenClasses:
    """A class for each token of a tokenizer.

    Attributes:
        names: names of the classes.
        of: index of each token's class in `names`, (vocab,).
    """

    names: tuple[str, ...]
    of: Tensor


def token_classes(tokenizer: PreTrainedTokenizerFast) -> TokenClasses:
    """Sort all tokens into classes by their text.

    A token with a letter is a word; otherwise one with a digit is a number; otherwise one with a visible character is a symbol;
    the rest is space. Bytes that are not text by themselves are `part of a character`; the end of a text and the tokenizer's
    other special tokens are `special`.
    """
    texts = tokenizer.batch_decode([[token] for token in range(vocabulary_size(tokenizer))])
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


def by_class(tokens: Tensor, classes: TokenClasses) -> list[Group]:
    """The classes that some of the tokens (tokens,) belong to."""
    kinds = classes.of[tokens]
    return [(name, kinds == i) for i, name in enumerate(classes.names) if (kinds == i).any()]


def by_loss(losses: Tensor) -> list[Group]:
    """Quarters of the tokens by their losses (tokens,), the quarter with the lowest first."""
    quarter = losses.argsort(stable=True).argsort() * len(_QUARTERS) // len(losses)
    return [(name, quarter == i) for i, name in enumerate(_QUARTERS) if (quarter == i).any()]
