import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yoco_u.checksums import SUMS, write_checksums
from yoco_u.data import BatchLoader, DataConfig, DatasetIndex, PackedDataset, SplitDocuments
from yoco_u.data.index import Shard, Split
from yoco_u.data.shards import ShardWriter
from yoco_u.errors import UserError

EOT = 7


def build(folder: Path, lengths: list[int], shard_tokens: int, dtype: str = "uint16") -> list[list[int]]:
    """Write a dataset of documents of EOT and unique numbers, and return the documents as lists."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    documents, number = [], 100
    with ShardWriter(folder, "train", dtype, shard_tokens) as writer:
        for length in lengths:
            documents.append([EOT, *range(number, number + length)])
            number += length
            writer.add(np.array(documents[-1], dtype=np.uint32), length + 1)
        split = writer.finish()
    index = {"dtype": dtype, "eot_id": EOT, "vocab_size": number, "config": DataConfig(), "folder": folder}
    DatasetIndex(splits={"train": split}, **index).save(folder)
    return documents


def slow_epoch(documents: list[list[int]], length: int, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """The rows of an epoch, computed directly from their definition."""
    generator = np.random.default_rng((seed, epoch))
    if shuffle:
        documents = [documents[index] for index in generator.permutation(len(documents))]
    stream = [token for document in documents for token in document]
    rows = [stream[at : at + length + 1] for at in range(0, len(stream), length)]
    rows = [row for row in rows if len(row) == length + 1]
    return [rows[index] for index in generator.permutation(len(rows))] if shuffle else rows


def slow_document_ids(row: list[int]) -> list[int]:
    ids, current = [], 0
    for position, token in enumerate(row[:-1]):
        current += position == 0 or token == EOT
        ids.append(current)
    return ids


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 60),
    length=st.integers(1, 25),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
def test_rows_and_batches_follow_their_definition(tmp_path, lengths, shard_tokens, length, seed, shuffle, dtype):
    documents = build(tmp_path / "d", lengths, shard_tokens, dtype)
    total = sum(map(len, documents))
    if total < length + 1:
        with pytest.raises(UserError, match=f"has {total} tokens, but one row of sequence_length {length} takes {length + 1}"):
            PackedDataset(tmp_path / "d", "train", length)
        return
    dataset = PackedDataset(tmp_path / "d", "train", length, seed=seed, shuffle=shuffle)
    expected = [row for epoch in range(3) for row in slow_epoch(documents, length, seed, epoch, shuffle)]
    assert 3 * dataset.rows_per_epoch == len(expected)
    assert [dataset.row(index).tolist() for index in range(len(expected))] == expected
    begins = np.cumsum([0, *map(len, documents)])[:-1]
    assert dataset.documents_per_epoch == sum(begins < dataset.rows_per_epoch * length)
    loader = BatchLoader(dataset, 2)
    for step in range(len(expected) // 2):
        batch, rows = loader.batch(step), expected[2 * step : 2 * step + 2]
        assert batch["input_ids"].tolist() == [row[:-1] for row in rows]
        assert batch["shift_labels"].tolist() == [row[1:] for row in rows]
        assert batch["document_ids"].tolist() == [slow_document_ids(row) for row in rows]
        assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "d", [5, 40, 1, 0, 17, 23, 9, 60, 3] * 4, 100)
    return tmp_path / "d"


def same(left: object, right: object) -> bool:
    return all(torch.equal(left[key], right[key]) for key in ("input_ids", "shift_labels", "document_ids"))


def test_epochs_differ_and_each_covers_every_row_of_its_stream(folder):
    dataset = PackedDataset(folder, "train", 8, seed=3)
    count = dataset.rows_per_epoch
    epochs = [[dataset.row(epoch * count + n).tolist() for n in range(count)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for rows in epochs:  # apart from the separators each token is unique, so a row is known by its inputs
        tokens = [token for row in rows for token in row[:-1] if token != EOT]
        assert len(tokens) == len(set(tokens))
        assert len(tokens) > 8 * count - 40
    assert epochs[0] != [PackedDataset(folder, "train", 8, seed=4).row(n).tolist() for n in range(count)]
    dataset.row(5 * count)
    assert dataset.row(0).tolist() == epochs[0][0]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_global_batch_exactly(folder, world_size):
    dataset = PackedDataset(folder, "train", 8)
    whole = BatchLoader(dataset, 6)
    parts = [BatchLoader(PackedDataset(folder, "train", 8), 6, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 57):
        joined = [part.batch(step) for part in parts]
        keys = whole.batch(step).keys()
        assert same({key: torch.cat([batch[key] for batch in joined]) for key in keys}, whole.batch(step))


def test_resuming_at_a_step_equals_going_through(folder):
    loader = BatchLoader(PackedDataset(folder, "train", 8), 4)
    through = loader.iterate()
    batches = [next(through) for _ in range(40)]  # over several epochs
    through.close()
    resumed = BatchLoader(PackedDataset(folder, "train", 8), 4).iterate(start_step=23)
    assert all(same(batch, next(resumed)) for batch in batches[23:])
    resumed.close()
    assert all(same(batch, loader.batch(step)) for step, batch in enumerate(batches))


def test_an_error_in_the_thread_reaches_the_reader(folder):
    with pytest.raises(IndexError, match="row -8"):
        next(BatchLoader(PackedDataset(folder, "train", 8), 8).iterate(start_step=-1))


def test_rows_must_divide_among_ranks(folder):
    dataset = PackedDataset(folder, "train", 8)
    for rows, world_size in [(6, 4), (0, 1), (-4, 2)]:
        with pytest.raises(UserError, match=f"{rows} rows a step do not divide among {world_size} processes"):
            BatchLoader(dataset, rows, 0, world_size)


def test_damage_is_noticed(folder):
    with pytest.raises(UserError, match="no validation split"):
        PackedDataset(folder, "validation", 8)
    with pytest.raises(UserError, match="sequence_length is 0"):
        PackedDataset(folder, "train", 0)
    tokens, offsets = folder / "train-00001.bin", folder / "train-00001.offsets.npy"
    good = offsets.read_bytes()
    offsets.write_bytes(good[:50])
    with pytest.raises(UserError, match="the dataset is damaged"):
        PackedDataset(folder, "train", 8)
    np.save(offsets, np.array([0, 3]))
    with pytest.raises(UserError, match=r"train-00001.offsets.npy: does not fit the index"):
        PackedDataset(folder, "train", 8)
    offsets.write_bytes(good)
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00001.bin: \d+ bytes, expected \d+ for \d+ tokens"):
        PackedDataset(folder, "train", 8)
    tokens.unlink()
    with pytest.raises(UserError, match="the dataset is damaged"):
        PackedDataset(folder, "train", 8)


def test_any_damage_to_a_file_is_noticed_by_its_checksum(folder):
    write_checksums(folder)
    DatasetIndex.load(folder).verify()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        good = path.read_bytes()
        index = DatasetIndex.load(folder)
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 4]))
        with pytest.raises(UserError, match=rf"{path}: the file is damaged.*remove the dataset and prepare it again"):
            index.verify()
        validation = [] if path.name.startswith("train-") or path.parent.name == "tokenizer" else [path]
        assert _is_damaged(index, "validation") == bool(validation)
        path.write_bytes(good)


def _is_damaged(index, split):
    try:
        index.verify(split)
    except UserError:
        return True
    return False


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_no_signal(folder):
    dataset = PackedDataset(folder, "train", 8)
    rows = [dataset.row(n).tolist() for n in range(dataset.rows_per_epoch)]
    for number in range(len(dataset.split.shards)):
        path = folder / f"train-{number:05d}.bin"
        path.write_bytes(path.read_bytes()[:2])
    failed = 0
    for n, row in enumerate(rows):
        try:
            assert dataset.row(n).tolist() == row
        except UserError as error:
            assert "ends before token" in str(error) and "prepare the dataset again" in str(error)
            failed += 1
    assert failed > len(rows) // 2


def test_more_shards_than_a_process_may_have_open_files(tmp_path):
    documents = build(tmp_path / "data", [3] * 200, shard_tokens=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(number) for number in os.listdir("/proc/self/fd")) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, before[1]), before[1]))
    try:
        dataset = PackedDataset(tmp_path / "data", "train", 10)
        rows = [dataset.row(number).tolist() for number in range(dataset.rows_per_epoch)]
        assert sorted(rows) == sorted(slow_epoch(documents, 10, 0, 0, True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_totals_are_sums_over_shards():
    split = Split(shards=(Shard(tokens=10, documents=2, bytes=30), Shard(tokens=5, documents=1, bytes=15)))
    assert (split.tokens, split.documents, split.bytes, split.bytes_per_token) == (15, 3, 45, 3.0)


def test_documents_come_whole_and_in_the_order_of_the_files(tmp_path):
    documents = build(tmp_path / "data", [3, 0, 40, 7, 1, 25], shard_tokens=20)
    found = SplitDocuments(tmp_path / "data", "train")
    assert [document.tolist() for document in found] == documents
