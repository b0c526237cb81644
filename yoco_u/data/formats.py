"""Readers of file formats. Each is a lazy stream of documents, and its errors name the exact place of what is wrong."""

import gzip
import io
import json
import os
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from yoco_u.errors import UserError, first_line

Advance = Callable[[int], None]
"""A callback that moves a progress bar on: it is called with the number of bytes read since the last call."""


class Document(NamedTuple):
    """One text and its name: the file, with `:line` or `:row` (from 1) behind it if the file holds many documents."""

    source: str
    text: str


def read_text(path: Path, name: str, advance: Advance) -> Iterator[Document]:
    """A file that is one document, in UTF-8 or, for a Python source, in the encoding of its cookie. Line ends are kept."""
    data = _read_bytes(path, name)
    advance(len(data))
    encoding = "utf-8-sig"
    try:
        if path.suffix in (".py", ".pyi"):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: byte 0x{data[error.start]:02x} is not {error.encoding}; convert the file to UTF-8"
        ) from None
    except (SyntaxError, LookupError, ValueError) as error:
        raise UserError(f"{name}:1: cannot tell the encoding ({error}); convert the file to UTF-8") from None
    yield document(name, text)


def read_json_lines(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A file with one JSON object a line, plain or gzipped; blank lines are left out."""
    number = 0
    try:
        with path.open("rb") as raw:
            lines: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            seen = 0
            for number, line in enumerate(lines, start=1):
                position = raw.tell()
                advance(position - seen)
                seen = position
                if line.strip():
                    yield _parse_line(line, f"{name}:{number}", field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name}:{number + 1}: corrupt gzip data ({error}); fetch or compress the file again") from None
    except OSError as error:
        raise UserError(f"{name}: cannot read the file ({error.strerror or error}); check the path") from None


def read_parquet(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A Parquet file with a string column, read in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{name}: {_no_field(field, file.schema_arrow.names)}")
            kind = file.schema_arrow.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise UserError(f"{name}: column {field!r} holds {kind}, expected strings; name another text_field")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield document(f"{name}:{row}", value.as_py(), field)
                advance(size * batch.num_rows // file.metadata.num_rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{row}: the text is not UTF-8 ({error.reason}); write the file again") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name}: corrupt Parquet file, after row {row} ({first_line(error)}); fetch or write it again"
        ) from None


def read_hugging_face(name: str, dataset: str, config: str | None, split: str, field: str) -> Iterator[Document]:
    """A Hugging Face dataset: a `save_to_disk` folder, or whatever `load_dataset` finds, which is streamed."""
    import datasets

    try:
        if is_saved_dataset(Path(dataset)):
            found: Any = datasets.load_from_disk(dataset)
            if isinstance(found, datasets.DatasetDict):
                found = found[split]
        else:
            found = datasets.load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:  # the library and the hub raise nearly anything
        raise UserError(
            f"{name}: cannot load split {split!r} ({first_line(error)}); expected hf:dataset[:config[:split]]"
        ) from None
    row = 0
    batches = iter(found.iter(batch_size=256))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise UserError(f"{name}: reading failed after row {row} ({first_line(error)})") from None
        if batch is None:
            return
        if field not in batch:
            raise UserError(f"{name}: {_no_field(field, list(batch))}")
        for text in batch[field]:
            row += 1
            yield document(f"{name}:{row}", text, field)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    files = (folder / "dataset_dict.json", folder / "state.json")
    return any(file.is_file() for file in files)


def document(source: str, text: object, field: str = "text") -> Document:
    """A document, after checking its text.

    Raises:
        UserError: if `text` is not a string, or holds half a surrogate pair, which UTF-8 cannot encode.
    """
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise UserError(f"{source}: {field!r} holds {kind}, expected a string; mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: {field!r} has the lone surrogate U+{ord(text[error.start]):04X}, which is no character; "
            "mend or remove it"
        ) from None
    return Document(source, text)


def _parse_line(line: bytes, source: str, field: str) -> Document:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: byte 0x{line[error.start]:02x} in column {error.start + 1} is not UTF-8; mend or remove it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{source}: the line holds {type(record).__name__}, expected a JSON object")
    if field not in record:
        raise UserError(f"{source}: {_no_field(field, list(record))}")
    return document(source, record[field], field)


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot read the file ({os.strerror(error.errno or 0)}); check the path") from None


def _no_field(field: str, known: list[str]) -> str:
    return f"no field {field!r}, there are {', '.join(map(repr, known)) or 'none'}; set text_field"
