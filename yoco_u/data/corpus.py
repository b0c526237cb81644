"""The documents of a corpus: from the entries of a config to one lazy stream in a fixed order."""

import hashlib
import os
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from yoco_u.data.compression import Advance, format_suffix
from yoco_u.data.config import DOCUMENTATION, PACKAGES, STDLIB
from yoco_u.data.documentation import read_description, read_docstrings
from yoco_u.data.formats import (
    GENERAL_SUFFIXES,
    READERS,
    TEXT_SUFFIXES,
    Document,
    has_documents,
    is_saved_dataset,
    is_single_dataset,
    read_hugging_face,
    read_text,
    reader_of,
)
from yoco_u.data.paths import is_hidden, matches, walk
from yoco_u.data.synthetic import is_synthetic, read_entry, synthetic_documents
from yoco_u.errors import UserError
from yoco_u.regular_files import SPECIAL

_MOST_TOLD = 8
_SITES = frozenset({"site-packages", "dist-packages"})
_CACHE = frozenset({"__pycache__"})


Identify = Callable[[Path], tuple[str, ...]]
_DOCSTRINGS = "docstrings:"


def is_path(entry: str) -> bool:
    """Whether an entry of a corpus is a path or a pattern, and not a name."""
    return entry not in _INSTALLED and not entry.startswith("hf:") and not is_synthetic(entry)


class _Source(NamedTuple):
    """A file or a Hugging Face dataset.

    Attributes:
        name: how errors and documents name it.
        size: bytes on disk; None if unknown.
        keys: two sources are the same file or dataset if they share one, however entries name them: its place, and for a file
            of a package also its contents.
        read: yields its documents, and reports the bytes that it has read.
    """

    name: str
    size: int | None
    keys: tuple[str, ...]
    read: Callable[[Advance], Iterator[Document]]


class Corpus:
    """The documents of a list of entries, in a fixed order.

    Entries are "stdlib", "packages", "documentation", paths, globs, and names that begin with `hf:` or `synthetic:`.

    Files are opened when their turn comes. A file that several entries reach is read once. Empty documents are left out. What
    folders and patterns lead to but is not read is told in a line on stderr.

    Args:
        entries: what to read.
        text_field: the field or column that holds the text.
        unique: whether equal files of installed packages are read once. To find them, all of them are read beforehand.
        held_out: says of the name of a generated document whether it is made of instances for tests; all are by default.

    Raises:
        UserError: if an entry leads to no file at all.
    """

    def __init__(
        self,
        entries: Sequence[str],
        text_field: str = "text",
        unique: bool = True,
        held_out: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.text_field, self._held_out = text_field, held_out
        self._identify = _place_and_contents if unique else _place
        self._left_out: Counter[str] = Counter()
        self._sources, self._names = list[_Source](), dict[str, str]()
        for source in [source for entry in entries for source in self._resolve(entry)]:
            if self._names.keys().isdisjoint(source.keys):
                self._sources.append(source)
            for key in source.keys:
                self._names.setdefault(key, source.name)
        if self._left_out:
            kinds = Counter(Path(source.name).suffix or "without a suffix" for source in self._sources)
            read, left_out = f"{len(self._sources)} read ({_listed(kinds)})", _listed(self._left_out)
            named = ", ".join(entries[:_MOST_TOLD]) + ", ..." * (len(entries) > _MOST_TOLD)
            told = f"{named}: {read}, {self._left_out.total()} left out ({left_out})"
            print(" ".join(told.encode(errors="backslashreplace").decode().split()), file=sys.stderr)  # names may hold anything

    @property
    def size(self) -> int | None:
        """Bytes on disk; None if a Hugging Face dataset is among the entries."""
        sizes = [source.size for source in self._sources]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def names(self) -> dict[str, str]:
        """The name of every file and dataset, by keys that are the same for the same file or dataset.

        Docstrings have the keys of the file that they are in.
        """
        return {key.removeprefix(_DOCSTRINGS): name for key, name in self._names.items()}

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

    def sample(self, seed: int) -> Iterator[Document]:
        """Every document, the files in an order that is drawn by a seed; errors as of `documents`."""
        drawn = random.Random(seed).sample(self._sources, len(self._sources))
        return (document for source in drawn for document in source.read(lambda _: None) if document.text)

    def _resolve(self, entry: str) -> list[_Source]:
        if not entry:
            raise UserError(
                "an entry of the corpus is empty; expected a path, a glob, an hf: or synthetic: name or "
                + ", ".join(_INSTALLED)
            )
        if entry in _INSTALLED:
            return _INSTALLED[entry](self._identify)
        if entry.startswith("hf:"):
            dataset, config, split, *rest = [*entry.removeprefix("hf:").split(":"), "", ""]
            if not dataset or any(rest):
                raise UserError(f"{entry}: expected hf:dataset[:config[:split]]")
            return [self._hugging_face(entry, dataset, config, split)]
        if is_synthetic(entry):
            return [self._synthetic(entry)]
        try:
            return self._paths(entry)
        except OSError as error:
            raise UserError(f"{error.filename or entry}: cannot read it ({error.strerror}); check the corpus setting") from None

    def _paths(self, entry: str) -> list[_Source]:
        path = Path(entry)
        if not os.path.lexists(path) and not os.path.lexists(path.parts[0]):
            path = Path(os.path.expanduser(entry))
        if path.is_dir():
            return self._folder(path)
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{entry}: {_special(path)}, expected a file or folder; check the corpus setting")
        files = [self._file(match) for match in matches(path) if self._is_file(match)]
        if not files:
            raise UserError(f"{entry}: no such file or folder, and no file matches it; check the corpus setting")
        return files

    def _folder(self, folder: Path) -> list[_Source]:
        if is_saved_dataset(folder):
            return [self._hugging_face(f"hf:{folder}", str(folder))]
        files = [self._file(path) for path in walk(folder) if self._is_known(path)]
        if not files:
            others = f", only {_listed(self._left_out)}" if self._left_out else ""
            raise UserError(
                f"{folder}: no text, JSON, CSV or Parquet file with texts in this folder{others}; "
                "name files of other kinds one by one or with a glob"
            )
        return files

    def _is_file(self, path: Path) -> bool:
        """Whether a path is a file; what is none is noted."""
        if path.is_file():
            return True
        self._left_out["folder" if path.is_dir() else _special(path)] += 1
        return False

    def _is_known(self, path: Path) -> bool:
        """Whether a path in a folder is a file of a kind that is read from folders; what is none is noted."""
        if is_hidden(path):
            self._left_out["hidden"] += 1
            return False
        if path.is_dir() or not self._is_file(path):
            return False
        suffix = format_suffix(path)
        if suffix in GENERAL_SUFFIXES and not has_documents(path, path.as_posix(), self.text_field):
            self._left_out[f"{suffix} without {self.text_field!r}"] += 1
            return False
        if suffix in READERS or suffix in TEXT_SUFFIXES:
            return True
        self._left_out[path.suffix or "without a suffix"] += 1
        return False

    def _file(self, path: Path) -> _Source:
        name, read = path.as_posix(), reader_of(path)
        return _Source(name, path.stat().st_size, _place(path), lambda advance: read(path, name, self.text_field, advance))

    def _hugging_face(self, name: str, dataset: str, config: str = "", split: str = "") -> _Source:
        folder, split = Path(dataset), split or "train"
        key = f"hf:{os.path.realpath(folder) if folder.is_dir() else dataset}"
        if not is_single_dataset(folder):
            key += f":{config}:{split}"
        return _Source(name, None, (key,), lambda _: read_hugging_face(name, dataset, config or None, split, self.text_field))

    def _synthetic(self, entry: str) -> _Source:
        settings = read_entry(entry)
        size, key = settings.documents * (settings.length - 1), f"synthetic:{settings.model_dump_json()}"
        return _Source(entry, size, (key,), lambda advance: synthetic_documents(entry, settings, self._held_out, advance))


def _special(path: Path) -> str:
    """What a path is that is neither a file nor a folder."""
    return f"link {path} that leads nowhere" if path.is_symlink() else SPECIAL


def _listed(counts: Counter[str]) -> str:
    """The counts of kinds of files, the most frequent first."""
    most = [f"{count:,} {kind}" for kind, count in counts.most_common(_MOST_TOLD)]
    more = len(counts) - len(most)
    return ", ".join([*most, f"{more} more kinds"] if more else most)


def _stdlib(identify: Identify) -> list[_Source]:
    """The running interpreter's own sources, named `stdlib/...` wherever they are installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Python 2, and files broken on purpose
    files = _python_files(root, _SITES | _CACHE, leave_out=root / "lib2to3" / "tests" / "data")
    sources = [_python_source(path, f"{STDLIB}/{path.relative_to(root).as_posix()}") for path in files]
    if not sources:
        raise UserError(f"{root}: this Python has no .py sources of its standard library; name another corpus")
    return sources


def _packages(identify: Identify) -> list[_Source]:
    """The sources of the packages that the running interpreter has installed, named `packages/...`.

    Packages copy files from each other: of files with equal contents the first one is read.
    """
    sources = [
        _python_source(path, f"{PACKAGES}/{path.relative_to(root).as_posix()}")._replace(keys=identify(path))
        for root in _sites()
        for path in _python_files(root, _CACHE)
    ]
    if not sources:
        raise UserError(f"{PACKAGES}: this Python has no packages with .py sources; name another corpus")
    return sources


def _documentation(identify: Identify) -> list[_Source]:
    """The descriptions and docstrings of the packages that the running interpreter has installed, named `documentation/...`."""
    sources = []
    for root in _sites():
        for path in sorted(root.glob("*.dist-info/METADATA")):
            name = f"{DOCUMENTATION}/{path.relative_to(root).as_posix()}"
            sources.append(_Source(name, path.stat().st_size, identify(path), partial(read_description, path, name)))
        for path in _python_files(root, _CACHE):
            name = f"{DOCUMENTATION}/{path.relative_to(root).as_posix()}"
            keys = tuple(f"{_DOCSTRINGS}{key}" for key in identify(path))
            sources.append(_Source(name, path.stat().st_size, keys, partial(read_docstrings, path, name)))
    if not sources:
        raise UserError(f"{DOCUMENTATION}: this Python has no packages with documentation; name another corpus")
    return sources


_INSTALLED = {STDLIB: _stdlib, PACKAGES: _packages, DOCUMENTATION: _documentation}
"""What is read from the running interpreter's installation, by the name of the entry."""


def _sites() -> list[Path]:
    return [Path(folder) for folder in sys.path if Path(folder).name in _SITES]


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
    return _Source(name, path.stat().st_size, _place(path), _lenient(path, name))


def _place(path: Path) -> tuple[str, ...]:
    return (os.path.realpath(path),)


def _place_and_contents(path: Path) -> tuple[str, ...]:
    return (*_place(path), f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")


def _lenient(path: Path, name: str) -> Callable[[Advance], Iterator[Document]]:
    """Reads a file, but yields nothing if it does not decode: there are such files to test Python with."""

    def read(advance: Advance) -> Iterator[Document]:
        try:
            yield from read_text(path, name, "", advance)
        except UserError:
            return

    return read
