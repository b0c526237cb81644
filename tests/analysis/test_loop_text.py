"""The batches that measures run on, and the classes of tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from yoco_u.analysis import document_batches, split_batches, token_classes
from yoco_u.data import Batch, DataConfig, Document, DocumentEncoder, PackedDataset, load_tokenizer, prepare
from yoco_u.errors import UserError

TEXTS = ["def f(x):\n    return x * 17\n", "täglich = [1, 2]\n" * 4, "x" * 50, "😀 😀\n"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looked-at")
    for split in ("train", "held-out"):
        (folder / split).mkdir()
        for i, text in enumerate(TEXTS):
            (folder / split / f"{i}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(corpus=(str(folder / "train"),), validation_corpus=(str(folder / "held-out"),), vocab_size=280)
    prepare(config, folder / "data", progress=False)
    return folder / "data"


def stream(batches: list[Batch]) -> list[int]:
    """All tokens in order: inputs, and the last target."""
    ids = [int(token) for batch in batches for row in batch["input_ids"] for token in row]
    return [*ids, int(batches[-1]["shift_labels"][-1, -1])]


def test_documents_are_packed_whole(dataset: Path) -> None:
    encoder = DocumentEncoder(load_tokenizer(dataset / "tokenizer"))
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    expected = [*np.concatenate(encoder.encode(TEXTS)).tolist(), encoder.eot_id]
    for length in (1, 7, 10_000):
        batches = document_batches(encoder, documents, length, 10**6)
        assert stream(batches) == expected
        assert sum(batch["input_ids"].numel() for batch in batches) == len(expected) - 1
        for batch in batches:
            assert batch["input_ids"].shape[1] <= length
            starts = batch["document_ids"].diff(dim=1) != 0
            assert torch.equal(starts, batch["input_ids"][:, 1:] == encoder.eot_id)


@pytest.mark.parametrize("tokens", [1, 7, 20, 21])
def test_no_more_documents_are_read_than_are_wanted(dataset: Path, tokens: int) -> None:
    encoder = DocumentEncoder(load_tokenizer(dataset / "tokenizer"))
    whole = np.concatenate(encoder.encode(TEXTS)).tolist()
    read: list[str] = []

    def documents():
        for text in TEXTS:
            read.append(text)
            yield Document("x", text)

    assert stream(document_batches(encoder, documents(), 7, tokens)) == whole[: tokens + 1]
    assert len(read) < len(TEXTS)


def test_a_split_is_looked_at_in_whole_rows(dataset: Path) -> None:
    split = PackedDataset(dataset, "validation", 8, shuffle=False)
    rows = [split.row(i) for i in range(split.rows_per_epoch)]
    for tokens, wanted in ((1, 1), (8, 1), (9, 2), (10**6, len(rows))):
        batches = split_batches(split, tokens)
        found = torch.cat([batch["input_ids"] for batch in batches]).tolist()
        assert found == [row[:-1].tolist() for row in rows[:wanted]]


def test_no_text(dataset: Path) -> None:
    encoder = DocumentEncoder(load_tokenizer(dataset / "tokenizer"))
    with pytest.raises(UserError, match="no text in the files"):
        document_batches(encoder, [], 8, 100)


def test_kinds_of_tokens(dataset: Path) -> None:
    tokenizer = load_tokenizer(dataset / "tokenizer")
    classes = token_classes(tokenizer)
    assert len(classes.of) == len(tokenizer)

    def kind(text: str) -> str:
        [token] = tokenizer(text, add_special_tokens=False).input_ids
        return classes.names[int(classes.of[token])]

    assert [kind(text) for text in ("x", "7", "*", " ", "\n")] == ["word", "number", "symbol", "space", "space"]
    assert kind("<|endoftext|>") == "special"
    first_byte = tokenizer("京", add_special_tokens=False).input_ids[0]
    assert classes.names[int(classes.of[first_byte])] == "part of a character"
