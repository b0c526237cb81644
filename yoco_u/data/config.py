"""The settings of a dataset: which documents it is made from, and with which tokenizer."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import BeforeValidator, Field

from yoco_u.config import Config, Needs

MINIMUM_VOCABULARY = 257
"""A byte-level tokenizer has at least one token for each byte, and `<|endoftext|>`."""

MAXIMUM_VOCABULARY = 1_000_000
"""The trainer of the tokenizer takes memory for all of its vocabulary before it looks at any text."""

STDLIB, PACKAGES, DOCUMENTATION = OWN_TEXTS = ("stdlib", "packages", "documentation")
"""Entries of a corpus that stand for texts of this machine."""

GENERATED = "synthetic:"
"""Begins an entry of a corpus that stands for generated documents."""


def _as_list(value: object) -> object:
    """A single entry stands for a list of one."""
    return [value] if isinstance(value, str) else value


Corpus = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]


class DataConfig(Config):
    """How a dataset is made. Equal configs over equal files make equal datasets.

    Attributes:
        corpus: what to read, one entry or a list: "stdlib" (the Python standard library's own sources), "packages" (the
            sources of the installed Python packages), "documentation" (their English prose), paths of files and folders, globs,
            `hf:dataset[:config[:split]]` names, and `synthetic:TASK[:KEY=VALUE...]` for generated documents, whose loss counts
            answers alone.
        text_field: the field or column of JSON, CSV and Parquet files and of Hugging Face datasets that holds the text.
        tokenizer: folder or Hugging Face name of an existing tokenizer; None trains one on the training split. Generated
            documents have one whose tokens are the bytes.
        special_tokens: whether what spells a special token is encoded as that token, for text that a chat template has
            rendered; otherwise it is encoded as any other text.
        vocab_size: largest vocabulary of the trained tokenizer (a small corpus may yield fewer tokens); not used with
            `tokenizer`.
        validation_fraction: share of the documents held out for validation, chosen by a hash of their names; not used with
            `validation_corpus`.
        validation_corpus: entries like those of `corpus` whose documents are the validation split. All of `corpus` is then for
            training.
        seed: seed of the split, and of the sample that the tokenizer is trained on.
        shard_tokens: size of a shard in tokens: it is closed at the first end of a document at or after this number.
    """

    corpus: Corpus = ("stdlib",)
    text_field: str = Field(default="text", min_length=1)
    tokenizer: str | None = None
    special_tokens: bool = False
    vocab_size: Annotated[int, Field(ge=MINIMUM_VOCABULARY, le=MAXIMUM_VOCABULARY), Needs("tokenizer", None)] = 4096
    validation_fraction: Annotated[float, Field(ge=0, lt=1), Needs("validation_corpus", None)] = 0.05
    validation_corpus: Corpus | None = None
    seed: int = Field(default=0, ge=0)
    shard_tokens: int = Field(default=100_000_000, ge=1)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        entries = (*self.corpus, *(self.validation_corpus or ()))
        if all(entry in OWN_TEXTS or entry.startswith(GENERATED) for entry in entries):
            yield "text_field", f"is for files and datasets with fields, and corpus is {', '.join(entries)}"
        generated = all(entry.startswith(GENERATED) for entry in entries)
        if generated:
            why = f"is for texts, and corpus is {', '.join(entries)}, whose tokens are the bytes"
            yield "special_tokens", why
            if self.vocab_size != MINIMUM_VOCABULARY:
                yield "vocab_size", why
        if self.validation_corpus and (generated or self.tokenizer):
            yield "seed", "is for the split and the tokenizer, and this config has neither to make"
