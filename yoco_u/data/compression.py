"""The bytes of files, decompressed."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from yoco_u.errors import UserError, first_line

Advance = Callable[[int], None]
"""A callback that moves a progress bar on: it is called with the number of bytes read since the last call."""

_BEGINNINGS = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
"""How compressed data begin, by the suffix that they usually have."""


def format_suffix(path: PurePath) -> str:
    """The suffix of a file in small letters, without that of a compression: `.jsonl` for `a.JSONL.gz`; empty without one."""
    return _inner(path).suffix.lower()


@contextmanager
def open_bytes(path: Path, name: str, advance: Advance) -> Iterator[tuple[io.BufferedIOBase, "Place"]]:
    """Open a file for reading, decompressed if its suffix or its first bytes say so.

    Args:
        name: how errors name the file.
        advance: called with the bytes that are read from disk.

    Yields:
        The bytes, and the place that errors name, which the reader moves on.

    Raises:
        UserError: if the file cannot be read or decompressed, naming the place.
    """
    place = Place(name)
    compression = ""
    try:
        with _Counted(path, advance) as raw, io.BufferedReader(raw) as buffered:
            compression = _compression(path, buffered)
            if compression and not buffered.peek(1):  # which gzip and zstd take for the end
                raise EOFError("the file is empty")
            stream = _decompressed(buffered, compression)
            with stream:
                yield stream, place
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if compression and getattr(error, "errno", None) is None:
            kind = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}.get(compression, "xz")
            raise UserError(
                f"{place.next}: corrupt {kind} data ({first_line(error)}); fetch or compress the file again"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot read the file ({reason}); check the path") from None


class Place:
    """A place in a file, for errors."""

    def __init__(self, name: str) -> None:
        self.name, self.line = name, 0

    @property
    def next(self) -> str:
        """The line after the last one that was read."""
        return f"{self.name}:{self.line + 1}"

    def __str__(self) -> str:
        return f"{self.name}:{self.line}"


class _Counted(io.FileIO):
    """A file that reports how much of it has been read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._advance(count)
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._advance(len(data))
        return data


class _Zstandard(io.RawIOBase):
    """Zstandard data, decompressed by Arrow."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Streams(io.RawIOBase):
    """Streams of bzip2 or xz data, one behind the other. Anything else behind a stream is damage, which Python passes over.

    Args:
        first, later: what makes a decompressor for the first stream, and for those behind it.
        padding: of how many zeros at a time there may be any number behind a stream; 0 for none.
    """

    def __init__(
        self, source: "io.BufferedReader[Any]", first: Callable[[], Any], later: Callable[[], Any], padding: int
    ) -> None:
        self._source, self._later, self._padding = source, later, padding
        self._decompressor, self._ahead = first(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressor.eof or self._begins_another():
            data = b""
            if self._decompressor.needs_input:
                data, self._ahead = self._ahead or self._more(), b""
                if not data:
                    raise EOFError("the data end within a stream")
            found = self._decompressor.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)
        return 0

    def _begins_another(self) -> bool:
        rest, zeros = self._decompressor.unused_data or self._more(), 0
        while self._padding and rest:
            found = rest.lstrip(b"\0")
            zeros += len(rest) - len(found)
            if found:
                rest = found
                break
            rest = self._more()
        if self._padding and zeros % self._padding:
            raise EOFError(f"{zeros} zeros behind a stream, which are no multiple of {self._padding}")
        if rest:
            self._decompressor, self._ahead = self._later(), rest
        return bool(rest)

    def _more(self) -> bytes:
        return self._source.read1(io.DEFAULT_BUFFER_SIZE)


def _inner(path: PurePath) -> PurePath:
    return path.with_suffix("") if path.suffix.lower() in _BEGINNINGS else path


def _compression(path: Path, stream: "io.BufferedReader[Any]") -> str:
    suffix = path.suffix.lower()
    if suffix in _BEGINNINGS:
        return suffix
    beginning = stream.peek(16)
    return next((suffix for suffix, pattern in _BEGINNINGS.items() if pattern.match(beginning)), "")


def _decompressed(stream: Any, compression: str) -> io.BufferedIOBase:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if compression == ".bz2":
        return io.BufferedReader(_Streams(stream, bz2.BZ2Decompressor, bz2.BZ2Decompressor, padding=0))
    if compression == ".xz":
        later = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
        return io.BufferedReader(_Streams(stream, lzma.LZMADecompressor, later, padding=4))
    return io.BufferedReader(_Zstandard(stream)) if compression == ".zst" else stream
