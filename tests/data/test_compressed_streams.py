"""Compressed data of several streams, as parallel compressors and `cat` make them: all of it is read, or it is refused."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.data import Corpus
from yoco_u.errors import UserError


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}
TEXTS = ["".join(f"{n * n} " for n in range(first, first + 200)) for first in (0, 1000, 2000)]
SUFFIXES = st.sampled_from(list(COMPRESSIONS))


def read(data: bytes, suffix: str) -> list[str]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"a.jsonl{suffix}"
        path.write_bytes(data)
        return [text for _, text in Corpus([str(path)], "text").documents()]


def streams(suffix: str, texts: Sequence[str] = TEXTS) -> list[bytes]:
    return [COMPRESSIONS[suffix](f'{{"text": "{text}"}}\n'.encode()) for text in texts]


@settings(max_examples=60, deadline=None)
@given(suffix=SUFFIXES, which=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_all_streams_are_read(suffix: str, which: list[int]) -> None:
    texts = [TEXTS[one] for one in which]
    assert read(b"".join(streams(suffix, texts)), suffix) == texts


@settings(max_examples=40, deadline=None)
@given(paddings=st.lists(st.sampled_from([0, 4, 8, 4000, 40_000]), min_size=3, max_size=3))
def test_xz_may_be_padded_behind_each_stream(paddings: list[int]) -> None:
    data = b"".join(stream + bytes(zeros) for stream, zeros in zip(streams(".xz"), paddings, strict=True))
    assert read(data, ".xz") == TEXTS


@settings(max_examples=300, deadline=None)
@given(suffix=SUFFIXES, data=st.data())
def test_a_damaged_stream_is_no_end(suffix: str, data: st.DataObject) -> None:
    """A byte of a later stream changes; near its beginning more often than elsewhere."""
    parts = streams(suffix)
    which = data.draw(st.integers(1, 2))
    end = len(parts[which]) - 1
    at = data.draw(st.integers(0, 12) | st.integers(0, end))
    changed = bytearray(parts[which])
    changed[at] ^= data.draw(st.integers(1, 255))
    parts[which] = bytes(changed)
    try:
        found = read(b"".join(parts), suffix)
    except UserError as error:
        assert "a.jsonl" in str(error), error
    else:
        assert len(found) == 3, found  # such as the time in a gzip header
        assert found == TEXTS or suffix == ".zst", found  # whose checksum is optional, and not written by Arrow


@settings(max_examples=200, deadline=None)
@given(suffix=SUFFIXES, data=st.data())
def test_a_cut_stream_is_no_end(suffix: str, data: st.DataObject) -> None:
    parts = streams(suffix)
    whole = len(b"".join(parts[:-1]))
    at = data.draw(st.integers(1, 12) | st.integers(1, len(parts[-1]) - 1))
    with pytest.raises(UserError, match=r"a.jsonl\S+:\d+: corrupt (gzip|bzip2|xz|zstd) data .*fetch or compress"):
        read(b"".join(parts)[: whole + at], suffix)


@settings(max_examples=200, deadline=None)
@given(
    suffix=SUFFIXES, garbage=st.sampled_from([b"\n", b"B", b"BZh", b"\xfd", b"]\0\0", b"-", b"xyz" * 9]) | st.binary(min_size=1)
)
def test_garbage_behind_the_streams_is_refused(suffix: str, garbage: bytes) -> None:
    if suffix in (".gz", ".xz") and not garbage.strip(b"\0"):
        garbage = b"\1" + garbage
    with pytest.raises(UserError, match=r"a.jsonl\S+:\d+: corrupt (gzip|bzip2|xz|zstd) data .*fetch or compress"):
        read(b"".join(streams(suffix)) + garbage, suffix)


@pytest.mark.parametrize("zeros", [1, 2, 3, 5, 8191, 8193])
def test_padding_of_xz_is_of_four_bytes(zeros: int) -> None:
    with pytest.raises(UserError, match="corrupt xz data"):
        read(streams(".xz")[0] + bytes(zeros), ".xz")
