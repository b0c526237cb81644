import gzip
import json
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from yoco_u.data import Corpus, DataConfig, prepare
from yoco_u.errors import UserError

TEXTS = ["first\r\ndocument", "zweites Dokument: ä 🦉", "  third\n\n"]


def read(*entries: object, field: str = "text") -> list[tuple[str, str]]:
    return [tuple(document) for document in Corpus([str(entry) for entry in entries], field).documents()]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_folder_is_walked_in_sorted_order_and_knows_text_from_the_rest(tmp_path):
    write(tmp_path / "b" / "one.md", "one")
    write(tmp_path / "a.txt", "two")
    write(tmp_path / "c.jsonl", lines({"text": "three"}))
    write(tmp_path / "image.png", b"\x89PNG")
    write(tmp_path / ".git" / "x.txt", "hidden")
    write(tmp_path / "empty.py", "")
    assert read(tmp_path) == [
        (f"{tmp_path}/a.txt", "two"),
        (f"{tmp_path}/b/one.md", "one"),
        (f"{tmp_path}/c.jsonl:1", "three"),
    ]


def test_a_named_file_is_read_whatever_its_suffix_and_a_file_only_once(tmp_path):
    log = write(tmp_path / "x.log", "log")
    write(tmp_path / "y.log", "more")
    write(tmp_path / "z.txt", "text")
    assert read(log) == [(str(log), "log")]
    assert [text for _, text in read(log, tmp_path / "*.log", tmp_path)] == ["log", "more", "text"]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "\ufeffwith a mark\r\n".encode(), "with a mark\r\n"),
        ("a.py", "# -*- coding: latin-1 -*-\n'ä'\n".encode("latin-1"), "# -*- coding: latin-1 -*-\n'ä'\n"),
    ],
)
def test_text_encodings(tmp_path, name, data, text):
    assert read(write(tmp_path / name, data)) == [(f"{tmp_path}/{name}", text)]


def formats(folder: Path, field: str) -> dict[str, str]:
    rows = [{field: text, "other": 1} for text in TEXTS]
    write(folder / "d.jsonl", lines(*rows).replace("\n", "\n\n"))
    write(folder / "d.jsonl.gz", gzip.compress(lines(*rows).encode()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=2)
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(folder / "splits")
    write(folder / "hub" / "train.jsonl", lines(*rows))
    names = {name: str(folder / name) for name in ("d.jsonl", "d.jsonl.gz", "d.parquet", "saved", "splits")}
    return {**names, "hf saved": f"hf:{folder}/saved", "hf": f"hf:{folder}/hub"}


def test_every_format_gives_the_same_texts_with_their_places(tmp_path):
    for field in ("text", "body"):
        folder = tmp_path / field
        folder.mkdir()
        for name, entry in formats(folder, field).items():
            documents = read(entry, field=field)
            assert [text for _, text in documents] == TEXTS, name
            numbers = [1, 3, 5] if name == "d.jsonl" else [1, 2, 3]
            assert [int(source.rsplit(":", 1)[1]) for source, _ in documents] == numbers, name
        assert [text for _, text in read(f"hf:{folder}/splits::test", field=field)] == TEXTS[:1]
        for name, entry in formats(folder, field).items():
            with pytest.raises(UserError, match=r"no field 'missing', there are '(text|body)', 'other'; set text_field"):
                print(name, read(entry, field="missing"))


def test_progress_adds_up_to_the_size(tmp_path):
    formats(tmp_path, "text")
    corpus = Corpus([str(tmp_path / name) for name in ("d.jsonl", "d.jsonl.gz", "d.parquet")])
    seen: list[int] = []
    list(corpus.documents(seen.append))
    assert corpus.size is not None
    assert corpus.size - 3 <= sum(seen) <= corpus.size
    assert Corpus([f"hf:{tmp_path}/saved"]).size is None


GOOD = json.dumps({"text": "good"}) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["text"]', "the line holds list, expected a JSON object"),
        (b'{"body": "x"}', "no field 'text', there are 'body'; set text_field"),
        (b'{"text": 5}', "'text' holds int, expected a string"),
        (b'{"text": null}', "'text' holds null, expected a string"),
        (b'{"text": "\xff"}', "byte 0xff in column 11 is not UTF-8"),
        (b'{"text": "\\ud800"}', r"lone surrogate U\+D800"),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_a_corrupt_line_is_named(tmp_path, line, message, gzipped):
    data = GOOD.encode() * 2 + line + b"\n" + GOOD.encode()
    name = "bad.jsonl.gz" if gzipped else "bad.jsonl"
    write(tmp_path / name, gzip.compress(data) if gzipped else data)
    with pytest.raises(UserError, match=f"{name}:3: .*{message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_corrupt_gzip(tmp_path):
    whole = gzip.compress("".join(lines({"text": str(n) * 50}) for n in range(1000)).encode())
    write(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2])
    write(tmp_path / "no.jsonl.gz", GOOD)
    with pytest.raises(UserError, match=r"cut.jsonl.gz:\d+: corrupt gzip data"):
        read(tmp_path / "cut.jsonl.gz")
    with pytest.raises(UserError, match=r"no.jsonl.gz:1: corrupt gzip data"):
        read(tmp_path / "no.jsonl.gz")


def test_corrupt_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 1000, None], "n": [1, 2]}), tmp_path / "null.parquet")
    whole = (tmp_path / "null.parquet").read_bytes()
    write(tmp_path / "cut.parquet", whole[: len(whole) // 2])
    write(tmp_path / "damaged.parquet", whole[:4] + b"\xff" * 60 + whole[64:])
    strings = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": strings}), tmp_path / "bytes.parquet")
    for name, message in [
        ("null", "null.parquet:2: 'text' holds null, expected a string"),
        ("cut", "cut.parquet: corrupt Parquet file, after row 0"),
        ("damaged", "damaged.parquet: corrupt Parquet file, after row 0"),
        ("bytes", "bytes.parquet:1: the text is not UTF-8"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"column 'n' holds int64, expected strings"):
        read(tmp_path / "null.parquet", field="n")


def test_corrupt_text(tmp_path):
    write(tmp_path / "a.txt", b"fine\nnot \xe4 fine\n")
    with pytest.raises(UserError, match=r"a.txt:2: byte 0xe4 is not utf-8"):
        read(tmp_path / "a.txt")
    write(tmp_path / "a.py", b"# coding: klingon\n")
    with pytest.raises(UserError, match=r"a.py:1: cannot tell the encoding \(unknown encoding.*klingon"):
        read(tmp_path / "a.py")


def test_entries_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    for entry, message in [
        (tmp_path / "none.txt", "none.txt: no such file or folder"),
        (tmp_path / "*.nothing", "no file matches it"),
        (tmp_path / "empty", "empty: no text, JSON, CSV or Parquet file with texts in this folder; name"),
        ("hf:", r"expected hf:dataset\[:config\[:split\]\]"),
        ("hf:a:b:c:d", r"expected hf:dataset\[:config\[:split\]\]"),
        (f"hf:{tmp_path}/empty", "cannot load split 'train'"),
    ]:
        with pytest.raises(UserError, match=message):
            read(entry)


CONTENTS = st.lists(st.sampled_from(["", "a = 1\n", "b = 2\n", "c = 3\n"]), min_size=1, max_size=12)


@given(contents=CONTENTS, sites=st.integers(1, 2))
def test_of_equal_files_in_packages_the_first_is_read(contents: list[str], sites: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        roots = [Path(folder, str(number), name) for number, name in enumerate(("site-packages", "dist-packages")[:sites])]
        written = []
        for number, text in enumerate(contents):
            file = roots[number % sites] / f"package{number % 3}" / f"module{number:02}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            written.append((number % sites, file.relative_to(roots[number % sites]), text))
        for name in ("__pycache__/x.py", "package/README.md", "package/module.pyc"):
            (roots[0] / name).parent.mkdir(parents=True, exist_ok=True)
            (roots[0] / name).write_text("d = 4\n")
        (roots[0] / "package" / "bad.py").write_bytes(b"broken = '\xff'\n")
        patch.setattr("sys.path", ["", "/usr/lib/python3", *map(str, roots)])
        expected: dict[str, str] = {}
        for _, path, text in sorted(written):
            expected.setdefault(text, f"packages/{path.as_posix()}")
        corpus = Corpus(["packages"])
        assert {text: source for source, text in corpus.documents()} == {t: s for t, s in expected.items() if t}
        assert [d.source for d in corpus.documents()] == [d.source for d in Corpus(["packages"]).documents()]


def test_an_interpreter_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["/usr/lib/python3"])
    with pytest.raises(UserError, match=r"no packages with \.py sources"):
        Corpus(["packages"])


def test_the_standard_library_is_this_interpreters_own():
    corpus = Corpus(["stdlib"])
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = corpus.documents()
    some = [next(documents) for _ in range(20)]
    for source, text in some:
        assert source.startswith("stdlib/")
        assert (root / source.removeprefix("stdlib/")).read_bytes().decode() == text
    names = list(corpus.names.values())
    assert "stdlib/json/decoder.py" in names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert names == list(Corpus(["stdlib"]).names.values())


def test_a_split_that_a_saved_dataset_does_not_have_is_refused(tmp_path):
    formats(tmp_path, "text")
    assert len(read(f"hf:{tmp_path}/saved")) == len(TEXTS)
    for name, message in [
        ("saved::test", "the folder holds one dataset"),
        ("splits::validation", "cannot load split 'validation'"),
        ("saved:english", "has no configs"),
        ("splits:english", "has no configs"),
    ]:
        with pytest.raises(UserError, match=message):
            read(f"hf:{tmp_path}/{name}")


def test_a_folder_with_one_file_of_a_saved_dataset_is_a_folder(tmp_path):
    for name in ("state.json", "dataset_info.json"):
        write(tmp_path / name / "a.txt", "text")
        write(tmp_path / name / name, "{}")
        assert [text for _, text in read(tmp_path / name)] == ["text"]


def test_a_saved_dataset_may_have_a_colon_in_its_path(tmp_path):
    Dataset.from_list([{"text": "text"}]).save_to_disk(tmp_path / "a:b")
    assert read(tmp_path / "a:b") == [(f"hf:{tmp_path}/a:b:1", "text")]


@pytest.fixture
def spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Ways to name one file or dataset, by what is named."""
    formats(tmp_path, "text")
    Dataset.from_list([{"text": "test"}], split="test").save_to_disk(tmp_path / "of a split")
    (tmp_path / "link").symlink_to(tmp_path)
    site = tmp_path / "site-packages"
    for package in ("a", "b"):  # which have equal files
        write(site / package / "module.py", f'"""{"Prose. " * 80}"""\n')
    write(site / "a.dist-info" / "METADATA", "Name: a\n\nA description.\n")
    monkeypatch.setattr("sys.path", [str(site)])
    monkeypatch.chdir(tmp_path)

    def folder(name: str) -> list[str]:
        places = [name, f"./{name}", f"{tmp_path}/{name}", f"link/{name}"]
        return [*places, f"hf:{name}", f"hf:{tmp_path}/{name}", f"hf:{name}::train"]

    return {
        "file": ["d.jsonl", f"{tmp_path}/d.jsonl", "link/d.jsonl", "d.json[l]", "link/*.jsonl"],
        "saved": folder("saved"),
        "splits": folder("splits"),
        "of a split": [*folder("of a split"), "hf:of a split::test"],
        "hub": ["hf:hub", f"hf:{tmp_path}/hub", "hf:link/hub::train"],
        "packages": ["packages", str(site), "link/site-packages", f"{site}/**/*.py"],
        "a part of packages": ["packages", f"{site}/a", f"{site}/b", "link/*/b/module.py", "documentation"],
        "a part of documentation": ["documentation", f"{site}/a.dist-info/METADATA", f"{site}/b"],
    }


def test_however_it_is_named_a_source_is_read_once_and_in_one_split(spellings, tmp_path):
    for what, (one, *others) in spellings.items():
        for other in others:
            for first, second in ((one, other), (other, one)):
                if not what.startswith("a part"):
                    assert [text for _, text in read(first, second)] == [text for _, text in read(first)]
                with pytest.raises(UserError, match="in both corpus and validation_corpus"):
                    prepare(DataConfig(corpus=first, validation_corpus=second), tmp_path / "out", progress=False)


def test_other_splits_and_folders_are_other_sources(spellings):
    assert len(read("splits", "hf:splits::test", "saved", "hf:hub")) == 3 * len(TEXTS) + 1
