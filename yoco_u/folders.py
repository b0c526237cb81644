"""Folders that appear whole or not at all, whenever a process is killed, and that take the place of nothing but our own.

Every folder that the package makes bears a mark, the file `.yoco-u-KIND`: `part` in folders that may be replaced and removed,
such as a checkpoint; another kind, such as `run`, in those that are only written into. What has no mark belongs to somebody
else, and stays. A folder that may be replaced has one of four names:
- `NAME.partial` while it is filled: not complete, and removed by the next writer if the one that filled it dies;
- `NAME` once it is complete and on the disk;
- `NAME.yoco-u-former` from when a newer one is about to take its place until that is there: complete, and put back by the next
  writer if this one dies in between;
- `NAME.old.partial` while it is removed.

Writers of one place, be they processes or threads, take turns by a lock on the mark, which moves with its folder: whoever makes
`NAME.partial` has its lock until the folder is `NAME` and what was there before is gone, and asks for that of `NAME` before it
renames it.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

from yoco_u.errors import UserError, naming
from yoco_u.locks import lock, unlock

PARTIAL = ".partial"
"""Suffix of folders that are not complete. Nothing ever reads them, and those that bear our mark may be removed."""

_MARK = ".yoco-u-"
_PART = "part"
_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)  # of a folder
_TRIES = 1000  # to make a folder that other writers make too


def beside(path: Path) -> Path:
    """The folder beside `path` in which it is made.

    Raises:
        UserError: if there can be none, as beside `.`, `..` and `/`.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: has no name of its own; name a new folder or file")
    return path.with_name(path.name + PARTIAL)


def free_name(path: Path) -> Path:
    """`path` if nothing is there, or else with the first of `-2`, `-3` and so on before its suffix at which nothing is."""
    return next(name for name in numbered(path) if not os.path.lexists(name))


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then with `-2`, `-3` and so on before its suffix."""
    yield path
    yield from (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))


class NewFolder:
    """An empty folder beside `path`, which `publish` renames once it has been filled. `close` has to be called in any case.

    What a writer left there that died is removed. If another one fills such a folder, this one waits until that is done.

    Attributes:
        path: the place that it is made for.
        folder: the folder to fill.

    Raises:
        UserError: if a folder of that name is there and is not ours.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, beside(path)
        settle(path)
        self._held: int | None = self._make()
        self._published = False

    def _make(self) -> int:
        for _ in range(_TRIES):
            _remove(self.folder, wait=True)
            try:
                self.folder.mkdir(parents=True)
                mark(self.folder)
            except FileExistsError:
                if _is_foreign(self.folder):
                    break
                continue
            except FileNotFoundError:  # another writer took it for what one left that died
                continue
            held = lock(_mark(self.folder), wait=True)
            if held is not None:
                return held
        raise _in_the_way(self.folder)

    def publish(self) -> None:
        """Rename the folder to `path`, after its contents have reached the disk; an older one is removed after that.

        Raises:
            UserError: if there is something else at `path`.
        """
        for file in [self.folder, *self.folder.rglob("*")]:
            if not file.is_symlink():
                sync(file)
        former = _set_aside(self.path)
        try:
            if os.path.lexists(self.path):
                raise _in_the_way(self.path)
            self.folder.replace(self.path)
            self._published = True
            sync(self.path.parent)
        finally:
            unlock(former)
            settle(self.path)

    def close(self) -> None:
        """Remove the folder unless it was published, and let other writers make theirs."""
        held, self._held = self._held, None
        unlock(held)
        if not self._published:
            _remove(self.folder)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends without an error.

    An error of the file system names `path`, whatever library it comes from.
    """
    with naming(path), closing(NewFolder(path)) as new:
        yield new.folder
        new.publish()


def settle(path: Path) -> None:
    """Bring to its end what a writer of `path` had begun that died: put back what it had only set aside, or remove it."""
    old, former = _old(path), _former(path)
    while marked(former) and not _is_foreign(former):
        held = lock(_mark(former), wait=True)
        if held is None:
            continue
        try:
            if not os.path.lexists(path):
                former.replace(path)
            elif not _is_foreign(path):
                _remove(old, wait=True)
                with suppress(OSError):  # `old` could not be removed
                    former.replace(old)
            break
        finally:
            unlock(held)
    _remove(old, wait=True)


def discard(folder: Path) -> None:
    """Remove a folder that is empty or ours; leave anything else alone, and what another writer fills.

    It is renamed first, so that no half of it is ever seen under its name.
    """
    if folder.suffix == PARTIAL:
        _remove(folder)
        return
    settle(folder)
    if marked(folder) and not _is_foreign(folder):
        held = lock(_mark(folder))
        if held is None:
            return
        try:
            folder.replace(_old(folder))
        finally:
            unlock(held)
        _remove(_old(folder), wait=True)
    else:
        _remove(folder)


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
    if _is_foreign(new):
        raise _in_the_way(new)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f"{new.name}.", dir=there))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(there)) from None


def check_part(path: Path) -> None:
    """Check that `NewFolder.publish` could put a folder at `path`, which `settle` comes before; errors as of `check_place`."""
    check_place(path)
    settle(path)
    for folder in (path, _former(path), _old(path)):
        if _is_foreign(folder):
            raise _in_the_way(folder)


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


def _set_aside(path: Path) -> int | None:
    """Call what is at `path` by its former name, if it is ours. Returns the lock of it; None if there is none to be kept."""
    while marked(path) and not _is_foreign(path):
        held = lock(_mark(path), wait=True)
        if held is None:
            continue
        try:
            settle(path)
            if os.path.lexists(_former(path)):
                raise _in_the_way(_former(path))
            path.replace(_former(path))
        except BaseException:
            unlock(held)
            raise
        return held
    _remove(path)
    return None


def _remove(folder: Path, wait: bool = False) -> None:
    """Remove a folder that is empty or ours, where it is; `wait` for who has its lock, or leave it alone then.

    Its mark goes last, so that what is left of it when the process dies is still known to be ours.
    """
    if _is_foreign(folder):
        return
    if not marked(folder):
        with suppress(OSError):  # something has come into it
            folder.rmdir()
        return
    held = lock(_mark(folder), wait)
    if held is None:
        return
    try:
        with suppress(OSError):  # a file that another process still reads keeps its folder on some file systems
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != _mark(folder):
                    entry.unlink()
            _mark(folder).unlink(missing_ok=True)
            folder.rmdir()
    finally:
        unlock(held)


def _former(path: Path) -> Path:
    """What a folder is called while another one is put in its place."""
    return path.with_name(f"{path.name}.yoco-u-former")


def _mark(folder: Path, kind: str = _PART) -> Path:
    return folder / f"{_MARK}{kind}"


def _old(folder: Path) -> Path:
    """What a folder is called while it is removed."""
    return folder.with_name(f"{folder.name}.old{PARTIAL}")


def _nearest_folder(path: Path) -> Path:
    there = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not there.is_dir():
        raise UserError(f"{there} is a {'file' if there.exists() else 'broken link'}; name a folder")
    return there


def _is_foreign(path: Path) -> bool:
    """Whether something is there that is neither ours nor an empty folder.

    Told from one list of names, since other writers make and remove folders of this name meanwhile. In any moment one of ours
    is empty or holds its mark, which comes first and goes last.
    """
    if path.is_symlink():
        return True
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True
    return bool(names) and _mark(path).name not in names


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _in_the_way(path: Path) -> UserError:
    return UserError(f"{path}: is in the way: it was not made by yoco-u, or cannot be removed; move it elsewhere")
