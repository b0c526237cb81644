"""What folders, links and patterns lead to."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yoco_u.data import Corpus
from yoco_u.data.paths import matches
from yoco_u.errors import UserError


def read(*entries: object) -> list[str]:
    return [text for _, text in Corpus([str(entry) for entry in entries]).documents()]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_mixed_folder_is_read_and_the_rest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.ndjson", '{"text": "two"}')
    write(tmp_path / "c.json", '[{"text": "three"}]')
    write(tmp_path / "d.csv", "text\nfour\n")
    write(tmp_path / "e.TSV", "n\ttext\n1\tfive\n")
    for name, text in [("package.json", '{"name": "x"}'), ("list.json", "[1]"), ("other.csv", "a,b\n1,2\n"), ("LICENSE", "no")]:
        write(tmp_path / "x" / name, text)
    write(tmp_path / "x" / ".hidden" / "a.txt", "no")
    write(tmp_path / "x" / "p.png", "no")
    write(tmp_path / "x" / "q.png", "no")
    (tmp_path / "x" / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "x" / "pipe.txt")
    assert read(tmp_path) == ["one", "two", "three", "four", "five"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "5 read (1 .txt, 1 .ndjson, 1 .json, 1 .csv, 1 .TSV), 9 left out (2 " in error
    for told in (
        "2 .json without 'text'", "1 .csv without 'text'", "2 .png", "1 without a suffix", "1 hidden",
        f"1 link {tmp_path}/x/gone that leads nowhere", "1 pipe, socket or device",
    ):  # fmt: skip
        assert told in error
    with pytest.raises(
        UserError, match=r"x: no text, JSON, CSV or Parquet file with texts in this folder, only 2 .json without"
    ):
        read(tmp_path / "x")
    with pytest.raises(UserError, match=r"gone: link .* that leads nowhere, expected a file or folder"):
        read(tmp_path / "x" / "gone")
    with pytest.raises(UserError, match=r"pipe.txt: pipe, socket or device, expected a file or folder"):
        read(tmp_path / "x" / "pipe.txt")
    capsys.readouterr()
    assert read(tmp_path / "*") == ["one", "two", "three", "four", "five"]
    assert "1 left out (1 folder)" in capsys.readouterr().err
    assert read(tmp_path / "a.txt", tmp_path / "**" / "*.ndjson") == ["one", "two"]
    assert capsys.readouterr().err == ""


def test_a_damaged_table_in_a_folder_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    damaged = write(tmp_path / "c.json", '[{"text": "three"}, {"text"')
    with pytest.raises(UserError, match=r"c.json:1: not valid JSON"):
        read(tmp_path)
    damaged.write_text('[{"text": null}]')
    with pytest.raises(UserError, match=r"c.json:1: 'text' holds null"):
        read(tmp_path)


def tree(root: Path, links: list[tuple[int, int]]) -> list[Path]:
    """Folders a/b/c and d below `root`, a file in each, and links from one of them to another."""
    folders = [root, root / "a", root / "a" / "b", root / "a" / "b" / "c", root / "d"]
    for number, folder in enumerate(folders):
        write(folder / "f.txt", f"text {number}")
    for number, (at, to) in enumerate(links):
        (folders[at] / f"l{number}").symlink_to(folders[to], target_is_directory=True)
    return folders


LINKS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6)


@settings(max_examples=12)
@given(links=LINKS)
def test_links_that_lead_back_end_and_a_file_is_read_once(links: list[tuple[int, int]], tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("tree")
    tree(root, links)
    texts = [f"text {number}" for number in range(5)]
    for entry in (root, root / "**", root / "**" / "**" / "f*"):
        assert sorted(read(entry)) == texts
    assert sorted(read(root, root / "**" / "f.txt")) == texts


NAMES = st.text(st.sampled_from("ab[]*?!-~ \n\udcff"), min_size=1, max_size=5).filter(str.strip)


@example(folder="~", file="a", others=[])
@given(folder=NAMES, file=NAMES, others=st.lists(NAMES, max_size=4))
def test_a_name_that_exists_is_no_pattern(folder: str, file: str, others: list[str], tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate([folder, *others]):
        path = root / name
        path.mkdir(exist_ok=True)
        (path / f"{file}.txt").write_text(f"{number}")
    expected = [(root / folder / f"{file}.txt").read_text()]
    assert read(root / folder / f"{file}.txt") == read(root / folder) == read(root / folder / "*.txt") == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert read(f"{folder}/*.txt") == read(folder) == expected


def test_patterns(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/.h.txt", "b/c/x.txt", ".h/x.txt", "x.txt"):
        write(tmp_path / name, name)

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in matches(tmp_path / pattern)]

    for pattern, expected in {
        "*": ["a", "b", "x.txt"],
        ".*": [".h"],
        "[ab]": ["a", "b"],
        "[!a]": ["b"],
        "?/x.txt": ["a/x.txt"],
        "**/x.txt": ["a/x.txt", "b/c/x.txt", "x.txt"],
        "**/?/x.txt": ["a/x.txt", "b/c/x.txt"],
        "**": ["a/x.txt", "b/c/x.txt", "x.txt"],
        "*/.h.txt": ["a/.h.txt"],
        "x.txt/*": [],
        "none/*": [],
    }.items():
        assert found(pattern) == expected, pattern


def test_entries_that_cannot_be_paths(tmp_path: Path) -> None:
    for entry in ("", "a\0b", "a\0*", "x" * 5000, "~nobody-of-this-name/x", f"{tmp_path}/none/../*.txt"):
        with pytest.raises(UserError):
            read(entry)
