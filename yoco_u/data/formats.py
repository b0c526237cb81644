"""Readers of file formats. Each is a lazy stream of documents, and its errors name the exact place of what is wrong."""

import codecs
import csv
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from yoco_u.data.compression import Advance, format_suffix, open_bytes
from yoco_u.errors import UserError, first_line

_PROSE = "txt md rst tex html xml css sql toml yaml yml"
_SOURCES = "py pyi c h cc cpp hpp cs java kt scala swift go rs js jsx ts tsx rb pl lua r jl sh bash"
TEXT_SUFFIXES = frozenset(f".{suffix}" for suffix in (*_PROSE.split(), *_SOURCES.split()))
"""Suffixes of files that are one document each."""

_COOKIE = b"coding:"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_FIELD = 2**31 - 1  # of CSV; the library's own limit is 128 KiB


class Document(NamedTuple):
    """One text and its name: the file, with `:line` or `:row` (from 1) behind it if the file holds many documents."""

    source: str
    text: str


class NoRecordsError(UserError):
    """The file does not hold records with the text field, as far as its beginning tells."""


Reader = Callable[[Path, str, str, Advance], Iterator[Document]]
"""Reads the documents of a file: its path, how errors and documents name it, the text field, and a callback for progress."""


def reader_of(path: Path) -> Reader:
    """The reader of a file, by its suffix; a file of any other suffix is one document."""
    return READERS.get(format_suffix(path), read_text)


def read_text(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A file that is one document, in UTF-8 or, for a Python source, in the encoding of its cookie. Line ends are kept."""
    data = _read_bytes(path, name, advance)
    suffix = format_suffix(path)
    text = _python_text(data, name) if suffix in (".py", ".pyi") else _decoded(data, name)
    if "\0" in text:
        raise UserError(f"{name}:{_line(text, text.index(chr(0)))}: a NUL byte, so this is no text; convert it or leave it out")
    if suffix not in TEXT_SUFFIXES and _is_record(text):
        raise UserError(f"{name}: looks like JSON lines; name it .jsonl, or .txt if all of it is one document")
    yield document(name, text)


def read_json_lines(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A file with one JSON object a line; blank lines are left out."""
    for place, line in _lines(path, name, advance):
        if line.strip():
            yield _of_record(_parsed(line, place), place, "line", field)


def read_json(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A JSON file: an array of objects, or objects one after another, on lines of their own or not. It is read at once."""
    text = _decoded(_read_bytes(path, name, advance), name)
    values = _json_values(text)
    number = 0
    while True:
        try:
            value = next(values, None)
        except json.JSONDecodeError as error:
            raise NoRecordsError(f"{name}:{error.lineno}: not valid JSON ({error})") from None
        except (ValueError, RecursionError) as error:
            raise NoRecordsError(f"{name}: not valid JSON ({error}), after record {number}") from None
        if value is None:
            return
        number += 1
        yield _of_record(value[0], f"{name}:{number}", "value", field)


def read_csv(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A table of values between commas, or tabs in `.tsv`, whose first row names the columns; blank rows are left out."""
    csv.field_size_limit(_LONGEST_FIELD)
    lines = (_decoded_line(line, place) for place, line in _lines(path, name, advance))
    rows = csv.reader(lines, delimiter="\t" if format_suffix(path) == ".tsv" else ",", strict=True)
    number = 0
    try:
        head = next(filter(None, rows), [])
        column = _column(head, field, name, NoRecordsError) if head else 0
        for row in filter(None, rows):
            number += 1
            if len(row) != len(head):
                raise UserError(f"{name}:{number}: {len(row)} values for {len(head)} columns; mend or remove the row")
            yield document(f"{name}:{number}", row[column], field)
    except csv.Error as error:
        raise UserError(f"{name}: line {rows.line_num}: not valid CSV ({error}); mend the row") from None


def read_parquet(path: Path, name: str, field: str, advance: Advance) -> Iterator[Document]:
    """A Parquet file with a string column, read in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet":
        raise UserError(f"{name}: a compressed Parquet file cannot be read; decompress it")
    row = 0
    try:
        size = path.stat().st_size
        with pq.ParquetFile(path) as file:
            number = _column(file.schema_arrow.names, field, name, UserError)
            kind = file.schema_arrow.field(number).type
            value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(
                is_kind(value_type) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
            ):
                raise UserError(f"{name}: column {field!r} holds {kind}, expected strings; name another text_field")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(field):  # by its name, as a struct `a` comes along with a column `a.b`
                    row += 1
                    yield document(f"{name}:{row}", value.as_py(), field)
                advance(size * batch.num_rows // file.metadata.num_rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{row}: the text is not UTF-8 ({error.reason}); write the file again") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name}: corrupt Parquet file, after row {row} ({first_line(error)}); fetch or write it again"
        ) from None


READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
"""The readers of files that hold many documents, by suffix."""

GENERAL_SUFFIXES = frozenset({".json", ".csv", ".tsv"})
"""Those among them that often hold something else than texts, such as settings."""


def has_documents(path: Path, name: str, field: str) -> bool:
    """Whether a file holds records with the text field, as far as its beginning tells; damage further on is for the reader."""
    try:
        next(reader_of(path)(path, name, field, lambda _: None), None)
    except NoRecordsError:
        return False
    except UserError:
        return True
    return True


def read_hugging_face(name: str, dataset: str, config: str | None, split: str, field: str) -> Iterator[Document]:
    """A Hugging Face dataset: a `save_to_disk` folder, or whatever `load_dataset` finds, which is streamed."""
    import datasets

    try:
        if is_saved_dataset(Path(dataset)):
            found: Any = datasets.load_from_disk(dataset)
            if config:
                raise ValueError("a folder of save_to_disk has no configs")
            if isinstance(found, datasets.DatasetDict):
                found = found[split]
            elif split not in ("train", str(found.split)):
                raise ValueError(f"the folder holds one dataset, of the split {found.split}")
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
    return is_single_dataset(folder) or (folder / "dataset_dict.json").is_file()


def is_single_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk` of one dataset, and not of several splits."""
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


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


def _column(names: list[str], field: str, name: str, missing: type[UserError]) -> int:
    """The number of the text's column, from 0.

    Raises:
        UserError: if several columns have its name; `missing` if none has.
    """
    if names.count(field) > 1:
        raise UserError(f"{name}: {names.count(field)} columns are called {field!r}; rename all but one")
    if field not in names:
        raise missing(f"{name}: {_no_field(field, names)}")
    return names.index(field)


def _of_record(record: object, source: str, kind: str, field: str) -> Document:
    if not isinstance(record, dict):
        raise NoRecordsError(f"{source}: the {kind} holds {type(record).__name__}, expected a JSON object")
    if field not in record:
        raise NoRecordsError(f"{source}: {_no_field(field, list(record))}")
    return document(source, record[field], field)


def _parsed(line: bytes, source: str) -> object:
    text = _decoded_line(line.removeprefix(codecs.BOM_UTF8), source)  # one may be there where files were joined
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); expected one object a line") from None


def _json_values(text: str) -> Iterator[tuple[object]]:
    """The elements of an array, or the values that stand one after another, each in a tuple.

    Raises:
        json.JSONDecodeError: where the text is no JSON.
    """
    decoder = json.JSONDecoder()

    def after_space(at: int) -> int:
        return _JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]

    at = after_space(0)
    in_array = text.startswith("[", at)
    if in_array:
        at = after_space(at + 1)
    first = True
    while not (text.startswith("]", at) if in_array else at == len(text)):
        if in_array and not first:
            if not text.startswith(",", at):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = after_space(at + 1)
        value, at = decoder.raw_decode(text, at)
        yield (value,)
        at, first = after_space(at), False
    if in_array and (end := after_space(at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data after the array", text, end)


def _lines(path: Path, name: str, advance: Advance) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, without a byte-order mark, each with its place."""
    with open_bytes(path, name, advance) as (stream, place):
        for line in stream:
            place.line += 1
            yield str(place), line.removeprefix(codecs.BOM_UTF8) if place.line == 1 else line


def _read_bytes(path: Path, name: str, advance: Advance) -> bytes:
    with open_bytes(path, name, advance) as (stream, _):
        return stream.read()


def _decoded(data: bytes, name: str, encoding: str = "utf-8-sig") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        place = f"{name}:{data.count(10, 0, error.start) + 1}"
        wide = " (UTF-16?)" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise UserError(
            f"{place}: byte 0x{data[error.start]:02x} is not {error.encoding}{wide}; convert the file to UTF-8"
        ) from None


def _decoded_line(line: bytes, source: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: byte 0x{line[error.start]:02x} in column {error.start + 1} is not UTF-8; mend or remove it"
        ) from None


def _python_text(data: bytes, name: str) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if _COOKIE.decode(encoding) != _COOKIE.decode("ascii"):  # or the cookie, which is in ASCII, would not be read back
            raise ValueError(f"{encoding} is no encoding of sources")
    except (SyntaxError, LookupError, ValueError) as error:
        raise UserError(f"{name}:1: cannot tell the encoding ({error}); convert the file to UTF-8") from None
    return _decoded(data, name, encoding)


def _is_record(text: str) -> bool:
    """Whether the first line of a text with something on it is a JSON object."""
    line = text.lstrip().split("\n", 1)[0]
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _no_field(field: str, known: list[str]) -> str:
    return f"no field {field!r}, there are {', '.join(map(repr, known)) or 'none'}; set text_field"
