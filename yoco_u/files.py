"""Files and folders that appear whole or not at all, even if the power fails, and that take the place of nothing but our own.

What is not complete lies in a folder `NAME.partial` beside its place, and is renamed when it is. Every folder that the package
makes bears a mark, the file `.yoco-u-KIND`: `part` in folders that may be replaced and removed, such as a checkpoint or
what is not complete; another kind, such as `run`, in those that are only written into. Files that users name bear a mark too,
see `is_result`. What has no mark belongs to somebody else, and stays.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from yoco_u.errors import UserError, system_error
from yoco_u.locks import lock, unlock
from yoco_u.version import __version__

T = TypeVar("T")

DAMAGED = "the file is damaged; restore it from a copy, or make it anew"
"""What the error about a file says that does not hold what was once written there."""

PARTIAL = ".partial"
"""Suffix of folders that are not complete. Nothing ever reads them, and those that bear our mark may be removed."""

GENERATOR = f"yoco-u {__version__}"
"""How the files that users name say who made them."""

_MARK = ".yoco-u-"
_PART = "part"
_RESULT = re.compile(
    rb'\A\{\s*"generator": "yoco-u |\AWritten by yoco-u '  # JSON, see `write_result`; text
    rb'|\A\{\s*"environment": \{\s*"started": "[^"]*",\s*"yoco_u": "'  # JSON of earlier versions, as that of the next two
    rb'|\A\{\s*"title": "(?:[^"\\]|\\.)*",\s*"version": "[^"]*",\s*"experiment": \{\s*"title": '
    rb'|\A\{\s*"about": \{\s*"text": "(?:[^"\\]|\\.)*",\s*"tokens": \d+,\s*"sequence_length": '
    rb"|\A\x89PNG.{0,999}Software\0yoco-u "  # `yoco_u.plotting.save_png`
    rb"|\AGGUF.{0,999}yoco_u\.generator.{12}yoco-u "  # `yoco_u.conversion.gguf_writer.write_gguf`
    rb'|\A\s*<!doctype html>.*<footer class="quiet">Written [^<]* by yoco-u [^<]*</footer>\s*</body>\s*</html>\s*\Z',
    re.DOTALL,
)
_MOST = 2048  # bytes of the beginning and of the end of a file that tell who made it
_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)  # of a folder
_TRIES = 100  # to make a folder that other processes make too


class DamagedFile(UserError):  # noqa: N818
    """A file is missing, or does not hold what was written to it."""


Say = Callable[[str], object]
"""What to do with a line for the user."""


def beside(path: Path) -> Path:
    """The folder beside `path` in which it is made.

    Raises:
        UserError: if there can be none, as beside `.`, `..` and `/`.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: has no name of its own; name a new folder or file")
    return path.with_name(path.name + PARTIAL)


def fresh_folder(path: Path) -> Path:
    """Make an empty folder beside `path`, which `publish(path)` renames once it has been filled.

    What a process left there that died is removed. If another process fills such a folder, this one waits until that is done.

    Raises:
        UserError: if a folder of that name is there and is not ours.
    """
    folder = beside(path)
    for _ in range(_TRIES):
        discard(folder)
        try:
            folder.mkdir(parents=True)
            mark(folder)
        except FileExistsError:
            unlock(lock(_mark(folder, _PART), wait=True))
        except FileNotFoundError:  # another process took it for what one left that died
            continue
        else:
            if lock(_mark(folder, _PART), wait=True) is not None:
                return folder
    raise _in_the_way(folder)


def publish(path: Path) -> None:
    """Rename the folder beside `path` to `path`, after its contents have reached the disk. An older one is removed first.

    Raises:
        UserError: if there is something else at `path`.
    """
    new = beside(path)
    for file in [new, *new.rglob("*")]:
        if not file.is_symlink():
            sync(file)
    discard(path)
    if os.path.lexists(path):
        raise _in_the_way(path)
    held = lock(_mark(new, _PART))
    new.replace(path)
    unlock(held)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a folder that is empty or ours; leave anything else alone, and what another process fills.

    It is renamed first, so that no half of it is ever seen under its name, and its mark goes last, so that what is left of it
    when the process dies is still known to be ours.
    """
    if folder.suffix != PARTIAL:
        discard(_old(folder))
    if not _is_ours(folder):
        return
    if not marked(folder):
        with suppress(OSError):  # something has come into it
            folder.rmdir()
        return
    held = lock(_mark(folder, _PART))
    if held is None:
        return
    try:
        if folder.suffix != PARTIAL:
            folder = folder.replace(_old(folder))
        with suppress(OSError):  # a file that another process still reads keeps its folder on some file systems
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != _mark(folder, _PART):
                    entry.unlink()
            _mark(folder, _PART).unlink(missing_ok=True)
            folder.rmdir()
    finally:
        unlock(held)


def mark(folder: Path, kind: str = _PART) -> None:
    """Mark a folder as ours."""
    if not marked(folder, kind):
        _mark(folder, kind).touch()


def marked(folder: Path, kind: str = _PART) -> bool:
    """Whether a folder bears our mark of this kind."""
    return _mark(folder, kind).is_file()


def is_mark(path: Path) -> bool:
    """Whether a file is a mark, of whatever kind."""
    return path.name.startswith(_MARK)


def check_claim(folder: Path, kind: str, known: Callable[[Path], bool] = lambda _: False) -> None:
    """Check that `claim` would take a folder, without making anything.

    Args:
        kind: what the folder is for; a single word.
        known: recognizes folders that were made before there were marks, by what they hold.

    Raises:
        UserError: if the folder holds anything and is not ours, or is no folder.
    """
    _nearest_folder(folder / "inside")
    # The mark is the first file in a folder, so it is looked for last: another process may be making the same folder.
    if folder.is_dir() and not _is_empty(folder) and not marked(folder, kind) and not known(folder):
        raise UserError(
            f"{folder}: holds other files than those of a yoco-u {kind}; name a new or an empty folder, or move them elsewhere"
        )


def claim(folder: Path, kind: str, known: Callable[[Path], bool] = lambda _: False) -> None:
    """Make and mark the folder that a command writes into; arguments and errors as of `check_claim`."""
    check_claim(folder, kind, known)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, kind)


def check_place(path: Path) -> None:
    """Check that a file or folder can be made beside `path`, in a folder that is there or can be made.

    Raises:
        UserError: if something that is not ours is in the way there.
        OSError: if the folder that it is in cannot be written to.
    """
    new, there = beside(path), _nearest_folder(path)
    if os.path.lexists(new) and not _is_ours(new):
        raise _in_the_way(new)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f"{new.name}.", dir=there))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(there)) from None


def check_part(path: Path) -> None:
    """Check that `publish` could put a folder at `path`; errors as of `check_place`."""
    check_place(path)
    for folder in (path, _old(path)):
        if os.path.lexists(folder) and not _is_ours(folder):
            raise _in_the_way(folder)


def is_result(path: Path) -> bool:
    """Whether a file is JSON, a picture, a page or a GGUF file that says that this package made it."""
    with path.open("rb") as file:
        head, size = file.read(_MOST), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST))
        return bool(_RESULT.search(head + file.read()))


def check_result(path: Path) -> None:
    """Check, before anything is computed, that a result may be written to a file that a user names.

    It may be new, or the result of an earlier command, see `is_result`.

    Raises:
        UserError: if something else is there.
        OSError: if its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    real = Path(os.path.realpath(path))
    if path.exists() or os.path.lexists(real):
        if not path.is_file():
            raise UserError(f"{path}: is no regular file; name another file")
        if not is_result(path):
            raise UserError(f"{path}: is there and was not made by yoco-u; name another file, or move it elsewhere")
    check_place(real)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, which becomes `path` in one moment when the block ends without an error.

    A link is followed. An error of the file system names `path`, whatever library it comes from.
    """
    path = Path(os.path.realpath(path))
    with naming(path):
        file = fresh_folder(path) / path.name
        try:
            yield file
            sync(file)
            file.replace(path)
            sync(path.parent)
        finally:
            discard(file.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends without an error; as `replacing` otherwise."""
    with naming(path):
        folder = fresh_folder(path)
        try:
            yield folder
            publish(path)
        finally:
            discard(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what libraries raise when the disk is full, or cannot be written to, into an OSError that names a file: `path`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        found = system_error(error)
        if found is None or (found is error and error.filename is not None):
            raise
        raise OSError(found.errno, found.strerror, found.filename or str(path)) from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Windows cannot do so for a folder, nor can some network drives.

    Nor can who may write in a folder but not list it.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_SYNC):
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, which appears whole or not at all."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_result(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that says who made it, unless something else is there; errors as of `check_result`."""
    check_result(path)
    write_json(path, {"generator": GENERATOR} | data)


def read_json(path: Path, shape: type[T], default: T | None = None, say: Say | None = None) -> T:
    """Read a JSON file. Every small file of a run, a dataset or a model is read by this function.

    Args:
        shape: what the file holds, as a type that pydantic checks: `dict[str, Any]`, `list[float]` or a model.
        default: what to return if there is no file.
        say: given by whoever makes the file anew where it is missing: so counts a damaged one then, which is said.

    Raises:
        UserError: if it cannot be read; it names the file.
        DamagedFile: if it is not JSON, or holds anything but `shape`; it names the file and the place.
    """
    if default is not None and not os.path.lexists(path):
        return default
    try:
        return parse_json(path.read_bytes(), shape, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except DamagedFile as error:
        if default is None or say is None:
            raise
        say(f"{str(error).removesuffix(DAMAGED)}it is made anew")
        return default


def parse_json(text: bytes, shape: type[T], source: str) -> T:
    """The value of a JSON text in UTF-8, as in `read_json`; `source` is where it came from, which the error names.

    Infinity and NaN, which JSON does not have, are errors too.
    """
    if not text.strip(b"\0 \n"):
        raise DamagedFile(f"{source}: empty; {DAMAGED}")
    try:
        adapter: TypeAdapter[T] = _adapter(cast("Any", shape))
        return adapter.validate_python(from_json(text, allow_inf_nan=False))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the whole"
        raise DamagedFile(f"{source}: {place}: {problem['msg']}; {DAMAGED}") from None
    except ValueError as error:
        raise DamagedFile(f"{source}: not JSON ({error}); {DAMAGED}") from None


def _mark(folder: Path, kind: str) -> Path:
    return folder / f"{_MARK}{kind}"


def _old(folder: Path) -> Path:
    """What a folder is called while it is removed."""
    return folder.with_name(f"{folder.name}.old{PARTIAL}")


def _nearest_folder(path: Path) -> Path:
    there = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not there.is_dir():
        raise UserError(f"{there} is a {'file' if there.exists() else 'broken link'}; name a folder")
    return there


def _is_ours(path: Path) -> bool:
    try:
        return path.is_dir() and not path.is_symlink() and (marked(path) or _is_empty(path))
    except FileNotFoundError:  # another process has removed it meanwhile
        return False


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _in_the_way(path: Path) -> UserError:
    return UserError(f"{path}: is in the way: it was not made by yoco-u, or cannot be removed; move it elsewhere")


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
