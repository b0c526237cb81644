"""Every format gives back the texts that an independent writer put into it, however the file is compressed or named."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.data import Corpus
from yoco_u.errors import UserError


def read(*entries: object, field: str = "text") -> list[str]:
    return [text for _, text in Corpus([str(entry) for entry in entries], field).documents()]


def table(texts: list[str], delimiter: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(
        [["n", "text", 'odd "name"'], *([n, text, ","] for n, text in enumerate(texts))]
    )
    return file.getvalue().encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()).dictionary_encode(), "n": list(range(len(texts)))}), sink)
    return bytes(sink.getvalue())


def zstandard(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    frames = []
    for part in (data[: len(data) // 2], data[len(data) // 2 :]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        frames.append(bytes(sink.getvalue()))
    return b"".join(frames)


def records(texts: list[str]) -> list[dict[str, object]]:
    return [{"n": [n, {"text": "no"}], "text": text} for n, text in enumerate(texts)]


def lines(texts: list[str], ascii_only: bool = True) -> bytes:
    return "\r\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in records(texts)).encode()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lines,
    "b.NDJSON": lambda texts: lines(texts, False),
    "array.json": lambda texts: json.dumps(records(texts), indent=1).encode(),
    "short.json": lambda texts: json.dumps(records(texts), ensure_ascii=False, separators=(",", ":")).encode(),
    "lines.json": lines,
    "objects.Json": lambda texts: "\n\n".join(json.dumps(one, indent=2) for one in records(texts)).encode(),
    "a.csv": lambda texts: table(texts, ","),
    "a.TSV": lambda texts: table(texts, "\t"),
    "a.Parquet": parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".XZ": lzma.compress,
    ".zst": zstandard,
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
DOCUMENTS = st.lists(TEXTS | st.sampled_from(['a,b\t"c"\r\n\'', "\r", "\ufeff", "\x85\u2028", '{"text": 1}']), max_size=6)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=15)
@given(texts=DOCUMENTS, mark=st.booleans(), suffix=st.sampled_from(list(COMPRESSIONS)), is_named=st.booleans())
def test_documents_come_back(name: str, texts: list[str], mark: bool, suffix: str, is_named: bool) -> None:
    data = WRITERS[name](texts)
    is_parquet = name == "a.Parquet"
    if not is_parquet:
        data = COMPRESSIONS[suffix](b"\xef\xbb\xbf" * mark + data)
        name += suffix * is_named
    with TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(data)
        sources = [source for source, _ in Corpus([f"{folder}/{name}"]).documents()]
        assert read(f"{folder}/{name}") == [text for text in texts if text]
        assert [int(source.rsplit(":", 1)[1]) for source in sources] == [n for n, text in enumerate(texts, 1) if text]


@settings(max_examples=15)
@given(
    text=TEXTS,
    suffix=st.sampled_from(list(COMPRESSIONS)),
    is_named=st.booleans(),
    name=st.sampled_from(["a.md", "a.HTML", "a"]),
)
def test_a_file_of_text_is_one_document(text: str, suffix: str, is_named: bool, name: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, name + suffix * is_named)
        path.write_bytes(COMPRESSIONS[suffix](text.encode("utf-8-sig")))
        assert read(path) == [text] * bool(text)


GOOD = '{"text": "good"}'


def two_columns_of_one_name() -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), written)
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "a\nb\0c", r"a.txt:2: a NUL byte, so this is no text"),
        *(
            ("a.py", f"# coding: {name}\nx = 1\n", r"a.py:1: cannot tell the encoding .*; convert the file to UTF-8")
            for name in ("rot13", "hex", "undefined", "utf-16-le")
        ),
        ("a.bin", bytes(range(256)), r"a.bin:2: byte 0x80 is not utf-8"),
        ("a.txt", "a text".encode("utf-16"), r"a.txt:1: byte 0xff is not utf-8 \(UTF-16\?\); convert the file to UTF-8"),
        ("a.txt", "a text".encode("utf-16-le"), r"a.txt:1: a NUL byte"),
        ("a.csv", "text\nä".encode("utf-16"), r"a.csv:1: byte 0xff in column 1 is not UTF-8"),
        ("a.json", GOOD.encode("utf-16"), r"a.json:1: byte 0xff is not utf-8 \(UTF-16\?\)"),
        ("records", f"\n {GOOD}\n{GOOD}", r"records: looks like JSON lines; name it .jsonl, or .txt if all of it is one"),
        ("a.json", f"[{GOOD}, {GOOD}", r"a.json:1: not valid JSON \(Expecting ',' or ']'"),
        ("a.json", f"[{GOOD},]", r"a.json:1: not valid JSON"),
        ("a.json", f"[{GOOD}]\n[{GOOD}]", r"a.json:2: not valid JSON \(Extra data after the array"),
        ("a.json", f"[\n{GOOD},\n 5]", r"a.json:2: the value holds int, expected a JSON object"),
        ("a.json", f"[{GOOD}, " + "[" * 100_000, r"a.json: not valid JSON .*, after record 1"),
        ("a.json", '[{"text": ' + "1" * 5000 + "}]", r"a.json: not valid JSON"),
        ("a.json", f'{GOOD}{{"text": null}}', r"a.json:2: 'text' holds null, expected a string"),
        ("a.json", '[{"text": "\\udead"}]', r"a.json:1: .*lone surrogate U\+DEAD"),
        ("a.json", '{"body": 1}', r"a.json:1: no field 'text', there are 'body'; set text_field"),
        ("a.csv", "a,b\n1,2", r"a.csv: no field 'text', there are 'a', 'b'; set text_field"),
        ("a.csv", "text,text\n1,2", r"a.csv: 2 columns are called 'text'; rename all but one"),
        ("a.csv", "a,text\n1,2\n1", r"a.csv:2: 1 values for 2 columns"),
        ("a.csv", 'a,text\n1,2\n1,"2', r"a.csv: line 3: not valid CSV"),
        ("a.csv", 'a,text\n1,"2"3', r"a.csv: line 2: not valid CSV"),
        ("a.parquet.gz", b"", r"a.parquet.gz: a compressed Parquet file cannot be read; decompress it"),
        ("a.parquet", GOOD, r"a.parquet: corrupt Parquet file"),
        ("a.parquet", two_columns_of_one_name(), r"a.parquet: 2 columns are called 'text'; rename all but one"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes | str, message: str) -> None:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSIONS if suffix])
def test_damaged_compressed_files_are_named(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESSIONS[suffix]("".join(f'{{"text": "{n * n}"}}\n' for n in range(9999)).encode())
    for name, data in [("cut", whole[: len(whole) // 2]), ("short", whole[:-1]), ("none", b""), ("other", b"not compressed")]:
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{path.name}:\d+: corrupt (gzip|bzip2|xz|zstd) data .*fetch or compress"):
            read(path)


def test_empty_files_hold_no_documents(tmp_path: Path) -> None:
    for name in [name for name in WRITERS if name != "a.Parquet"] + ["a.txt", "a"]:
        (tmp_path / name).write_bytes(b"")
        assert read(tmp_path / name) == []
    (tmp_path / "blank.json").write_text(" \n")
    (tmp_path / "none.json").write_text(" [ ] ")
    assert read(tmp_path / "blank.json", tmp_path / "none.json") == []


def test_a_field_may_be_longer_than_what_the_library_takes_by_default(tmp_path: Path) -> None:
    long = "x" * (csv.field_size_limit() + 1 if csv.field_size_limit() < 1 << 20 else 1 << 20)
    (tmp_path / "a.csv").write_bytes(table([long], ","))
    assert read(tmp_path / "a.csv") == [long]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("others", [["a"], ["text"], ["text", "text.y"], ["b", "text"]])
def test_a_column_is_found_beside_structs_of_like_names(tmp_path: Path, others: list[str], first: bool) -> None:
    structs = {name: [{"x": "no", "y": 1}, {"x": "no", "y": 2}] for name in others}
    column = {"text.x": ["one", "two"]}
    pq.write_table(pa.table(column | structs if first else structs | column), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="text.x") == ["one", "two"]
