"""`dataset.json`, the index of a prepared dataset. It is written last, so that a folder that has it is complete."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from yoco_u.checksums import checksums_digest, verify_checksums
from yoco_u.config import Config, parse
from yoco_u.data.config import DataConfig
from yoco_u.errors import UserError
from yoco_u.files import read_json, write_text

INDEX = "dataset.json"
TOKENIZER = "tokenizer"

SplitName = Literal["train", "validation"]


class Shard(Config):
    """Totals of one shard: the pair of files `<split>-<number>.bin` and `<split>-<number>.offsets.npy`."""

    tokens: PositiveInt
    documents: PositiveInt
    bytes: PositiveInt


class Split(Config):
    """Totals of a split. `bytes` counts the texts in UTF-8; `tokens` includes the `<|endoftext|>` of each document."""

    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token. Bits per byte are the mean loss in nats / ln 2 / this."""
        return self.bytes / self.tokens


class DatasetIndex(Config):
    """The contents of `dataset.json`: what `prepare` made.

    Attributes:
        format: version of the folder's format.
        dtype: type of the token ids in the `.bin` files, little-endian.
        eot_id: the token `<|endoftext|>`, which begins every document and occurs nowhere else.
        vocab_size: the tokenizer's largest token id + 1, added tokens included.
        config: the config that the dataset was made from.
        working_folder: the folder in which relative paths of the config begin, seen from the dataset's folder; None if unknown.
        answers: the tokens before and behind an answer, where answers alone are targets; None where every token is one.
        splits: totals of "train", and of "validation" if anything was held out.
        folder: the folder that the index was read from; it is not written.
    """

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    eot_id: int
    vocab_size: int
    config: DataConfig
    working_folder: str | None = None
    answers: tuple[int, int] | None = None
    splits: dict[SplitName, Split]
    folder: Path = Field(exclude=True)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.folder / TOKENIZER

    def split(self, name: SplitName) -> Split:
        """The totals of a split.

        Raises:
            UserError: if the dataset has no such split.
        """
        if name not in self.splits:
            raise UserError(
                f"{self.folder / INDEX}: no {name} split, there is {', '.join(self.splits)}; "
                "prepare with validation_fraction or validation_corpus"
            )
        return self.splits[name]

    @property
    def digest(self) -> str | None:
        """What tells the tokens of the dataset from others; None for a dataset of an earlier version, without checksums.

        The same texts, prepared again by the same config from another folder, have the same.
        """
        return checksums_digest(self.folder, lambda name: name.startswith(tuple(f"{split}-" for split in self.splits)))

    def verify(self, split: SplitName | None = None) -> None:
        """Compare the files with the checksums that `prepare` wrote; a dataset of an earlier version has none.

        Args:
            split: compare the index and the shards of this split alone; by default everything.

        Raises:
            DamagedFile: if a file is missing or differs.
        """

        def wanted(name: str) -> bool:
            return split is None or name == INDEX or name.startswith(f"{split}-")

        verify_checksums(self.folder, "remove the dataset and prepare it again", wanted)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `dataset.json` into `folder`. It appears whole, by a rename."""
        write_text(Path(folder) / INDEX, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DatasetIndex":
        """Read the index of a prepared dataset.

        Raises:
            UserError: if the folder holds no complete dataset, or one of another format version.
        """
        path = Path(folder) / INDEX
        if not os.path.lexists(path):
            raise UserError(f"{folder}: no prepared dataset here ({INDEX} is missing); run `yoco-u prepare`")
        data = read_json(path, dict[str, Any])
        if data.get("format") != 1:
            raise UserError(f"{path}: dataset format {data.get('format')!r}, expected 1; prepare the dataset again")
        return parse(cls, data | {"folder": Path(folder)}, str(path), written=True)


def check_vocabulary(index: DatasetIndex, vocab_size: int) -> None:
    """Check that a model with `vocab_size` embeddings can read the dataset.

    Raises:
        UserError: if the tokenizer has larger ids than the model.
    """
    if index.vocab_size > vocab_size:
        raise UserError(
            f"{index.folder / INDEX}: the tokenizer has {index.vocab_size} tokens but the model's vocab_size is "
            f"{vocab_size}; set architecture.vocab_size to at least {index.vocab_size} or "
            "prepare with a smaller data.vocab_size"
        )
    if not 0 <= index.eot_id < index.vocab_size:
        raise UserError(
            f"{index.folder / INDEX}: eot_id is {index.eot_id}, beyond the vocabulary of {index.vocab_size}; "
            "the dataset is damaged, remove it and prepare it again"
        )
