"""The documents of a corpus: from the entries of a config to one lazy stream in a fixed order."""

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from yoco_u.data.formats import (
    Advance,
    Document,
    is_saved_dataset,
    read_hugging_face,
    read_json_lines,
    read_parquet,
    read_text,
)
from yoco_u.errors import UserError

STDLIB = "stdlib"
PACKAGES = "packages"

_PROSE = "txt md rst tex html xml css sql toml yaml yml"
_SOURCES = "py pyi c h cc cpp hpp cs java kt scala swift go rs js jsx ts tsx rb pl lua r jl sh bash"
TEXT_SUFFIXES = frozenset(f".{suffix}" for suffix in (*_PROSE.split(), *_SOURCES.split()))
"""Suffixes of the text files that are read from a folder. A file that an entry names itself is read whatever its suffix."""

_SITES = frozenset({"site-packages", "dist-packages"})
_CACHE = frozenset({"__pycache__"})


class _Source(NamedTuple):
    """A file or a Hugging Face dataset.

    Attributes:
        name: how errors and documents name it.
        size: bytes on disk; None if unknown.
        identity: the same for the same file or dataset, however an entry names it; for a file of a package, the same for equal
            contents.
        read: yields its documents, and reports the bytes that it has read.
    """

    name: str
    size: int | None
    identity: str
    read: Callable[[Advance], Iterator[Document]]


class Corpus:
    """The documents of a list of entries ("stdlib", "packages", paths, globs, `hf:` names), always in the same order.

    Files are opened when their turn comes. A file that several entries reach is read once. Empty documents are left out.

    Raises:
        UserError: if an entry leads to no file at all.
    """

    def __init__(self, entries: Sequence[str], text_field: str = "text") -> None:
        self.text_field = text_field
        sources = {source.identity: source for entry in reversed(entries) for source in reversed(self._resolve(entry))}
        self._sources = list(reversed(sources.values()))

    @property
    def size(self) -> int | None:
        """Bytes on disk; None if a Hugging Face dataset is among the entries."""
        sizes = [source.size for source in self._sources]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def names(self) -> dict[str, str]:
        """The name of every file and dataset, by a key that is the same for the same file or dataset."""
        return {source.identity: source.name for source in self._sources}

    def documents(self, advance: Advance = lambda _: None) -> Iterator[Document]:
        """Every document.

        Args:
            advance: called with the number of bytes that were read from disk since the last call.

        Raises:
            UserError: at the first thing that cannot be read, naming file and line.
        """
        for source in self._sources:
            for document in source.read(advance):
                if document.text:
                    yield document

    def _resolve(self, entry: str) -> list[_Source]:
        if entry == STDLIB:
            return _stdlib()
        if entry == PACKAGES:
            return _packages()
        if entry.startswith("hf:"):
            return [self._hugging_face(entry)]
        path = Path(entry).expanduser()
        if path.is_dir():
            return self._folder(path)
        if path.exists():
            return [self._file(path)]
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [self._file(match) for match in matches if match.is_file()]
        if not files:
            raise UserError(f"{entry}: no such file or folder, and no file matches it; check the corpus setting")
        return files

    def _folder(self, folder: Path) -> list[_Source]:
        if is_saved_dataset(folder):
            return [self._hugging_face(f"hf:{folder}")]
        files = [self._file(path) for path in _walk(folder) if path.suffix.lower() in TEXT_SUFFIXES or _is_table(path)]
        if not files:
            raise UserError(
                f"{folder}: no text, .jsonl, .jsonl.gz or .parquet file in this folder; "
                "name files of other kinds one by one or with a glob"
            )
        return files

    def _file(self, path: Path) -> _Source:
        name, field = path.as_posix(), self.text_field

        def read(advance: Advance) -> Iterator[Document]:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                return read_json_lines(path, name, field, advance)
            if path.suffix == ".parquet":
                return read_parquet(path, name, field, advance)
            return read_text(path, name, advance)

        return _Source(name, path.stat().st_size, os.path.realpath(path), read)

    def _hugging_face(self, entry: str) -> _Source:
        dataset, config, split, *rest = [*entry.removeprefix("hf:").split(":"), "", ""]
        if not dataset or any(rest):
            raise UserError(f"{entry}: expected hf:dataset[:config[:split]]")
        split = split or "train"
        identity = f"hf:{dataset}:{config}:{split}"
        return _Source(
            entry, None, identity, lambda _: read_hugging_face(entry, dataset, config or None, split, self.text_field)
        )


def _is_table(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _walk(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its subfolders, sorted by name within each; hidden files and folders are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _stdlib() -> list[_Source]:
    """The running interpreter's own sources, named `stdlib/...` wherever they are installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Python 2, and files broken on purpose
    files = _python_files(root, _SITES | _CACHE, leave_out=root / "lib2to3" / "tests" / "data")
    sources = [_python_source(path, f"{STDLIB}/{path.relative_to(root).as_posix()}") for path in files]
    if not sources:
        raise UserError(f"{root}: this Python has no .py sources of its standard library; name another corpus")
    return sources


def _packages() -> list[_Source]:
    """The sources of the packages that the running interpreter has installed, named `packages/...`.

    Packages copy files from each other, so the contents of a file are its identity: of equal files the first one is read.
    """
    roots = [Path(folder) for folder in sys.path if Path(folder).name in _SITES]
    sources = [
        _python_source(path, f"{PACKAGES}/{path.relative_to(root).as_posix()}")._replace(identity=_contents(path))
        for root in roots
        for path in _python_files(root, _CACHE)
    ]
    if not sources:
        raise UserError(f"{PACKAGES}: this Python has no packages with .py sources; name another corpus")
    return sources


def _python_files(root: Path, skipped: frozenset[str], leave_out: Path | None = None) -> Iterator[Path]:
    """Every `.py` file in a folder and its subfolders, in a fixed order.

    Args:
        skipped: names of folders that are left out wherever they are.
        leave_out: one more folder to leave out.
    """
    for folder, folders, files in os.walk(root):
        if Path(folder) == leave_out:
            folders.clear()
            continue
        folders[:] = sorted(set(folders) - skipped)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _python_source(path: Path, name: str) -> _Source:
    return _Source(name, path.stat().st_size, os.path.realpath(path), _lenient(path, name))


def _contents(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _lenient(path: Path, name: str) -> Callable[[Advance], Iterator[Document]]:
    """Reads a file, but yields nothing if it does not decode: there are such files to test Python with."""

    def read(advance: Advance) -> Iterator[Document]:
        try:
            yield from read_text(path, name, advance)
        except UserError:
            return

    return read
