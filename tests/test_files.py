"""What is not ours stays as it is, whatever is written; what we write appears whole or not at all, on a disk that fails too."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_disk import failing_disk
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from yoco_u.errors import UserError, describe_system_error, system_error
from yoco_u.files import check_result, read_json, replacing, write_json, write_result, write_text
from yoco_u.folders import NewFolder, beside, check_claim, check_part, check_place, claim, discard, mark, replacing_folder


def contents(folder: Path) -> dict[str, str]:
    """Everything in a folder by its path, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "link " + os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else None
        found[str(path.relative_to(folder))] = kind or (path.read_text("latin-1") if path.is_file() else "special")
    return found


def folder_of_a_user(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def link_to_a_folder(path: Path) -> None:
    folder_of_a_user(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def link_to_a_file(path: Path) -> None:
    (path.parent / "elsewhere").write_text("years of work")
    path.symlink_to("elsewhere")


USERS: dict[str, Callable[[Path], None]] = {
    "file": lambda path: path.write_text("years of work") and None,
    "empty file": lambda path: path.touch(),
    "folder": folder_of_a_user,
    "link to a folder": link_to_a_folder,
    "link to a file": link_to_a_file,
    "link in a circle": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
}
"""What users may have put at a path."""


def make_part(path: Path) -> None:
    with replacing_folder(path) as folder:
        (folder / "ours").write_text("1")


def write_part(path: Path) -> None:
    check_part(path)
    make_part(path)


def write_claimed(path: Path) -> None:
    claim(path, "run")
    write_json(path / "ours", 1)


def write_named(path: Path) -> None:
    check_result(path)
    write_result(path, {"ours": 1})


WAYS = {"part": write_part, "claimed": write_claimed, "named": write_named}
"""The three ways in which the package writes to a path."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["out", "out.partial", "out.old.partial", "out.yoco-u-former"])
@pytest.mark.parametrize("user", USERS)
def test_what_a_user_put_there_stays(tmp_path: Path, user: str, name: str, way: str) -> None:
    USERS[user](tmp_path / name)
    before = contents(tmp_path)
    try:
        WAYS[way](tmp_path / "out")
    except UserError as error:
        assert "out" in str(error)
        assert contents(tmp_path) == before
    else:
        assert contents(tmp_path).items() >= before.items()
        assert name != "out" or user.startswith("link in"), "it was overwritten"


@pytest.mark.parametrize("way", WAYS)
def test_our_own_are_replaced_and_nothing_is_left_beside_them(tmp_path: Path, way: str) -> None:
    for _ in range(2):
        WAYS[way](tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["experiment", "analysis"])
def test_a_folder_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    claim(tmp_path / "out", kind)
    with pytest.raises(UserError, match="holds other files than those of a yoco-u run"):
        check_claim(tmp_path / "out", "run")
    with pytest.raises(UserError, match="in the way"):
        check_part(tmp_path / "out")


def test_links_are_followed_when_a_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "latest.json").symlink_to("there/result.json")
    for value in (1, 2):
        check_result(tmp_path / "latest.json")
        write_result(tmp_path / "latest.json", {"value": value})
        assert json.loads((tmp_path / "there" / "result.json").read_text())["value"] == value
    assert (tmp_path / "latest.json").is_symlink()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_devices_are_refused(device: str) -> None:
    with pytest.raises(UserError, match="no regular file"):
        check_result(Path(device))
    assert Path(device).exists()


def steps(path: Path) -> dict[str, Callable[[], object]]:
    """Everything that the module does to a disk, each with what leads to it."""
    return {
        "write": lambda: write_text(path / "file", "new"),
        "part": lambda: make_part(path / "part"),
        "claim": lambda: claim(path / "deep" / "folder", "run"),
        "discard": lambda: discard(path / "part"),
    }


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("step", steps(Path()))
def test_on_a_failing_disk_there_is_the_old_or_the_new_and_the_next_try_succeeds(
    tmp_path: Path, step: str, lasting: bool
) -> None:
    def fresh(number: int) -> Path:
        folder = tmp_path / str(number)
        folder.mkdir()
        write_text(folder / "file", "old")
        make_part(folder / "part")
        return folder

    with failing_disk(tmp_path) as disk:
        folder = fresh(0)
        disk.writes = 0
        steps(folder)[step]()
        number, whole = disk.writes, contents(folder)
    assert number
    for k in range(1, number + 1):
        folder = fresh(k)
        with failing_disk(folder, k, errno.ENOSPC, lasting):
            try:
                steps(folder)[step]()
            except OSError as error:
                assert error.errno == errno.ENOSPC and str(folder) in str(error)
        assert (folder / "file").read_text() in ("old", "new")
        assert not (folder / "part").exists() or (folder / "part" / "ours").read_text() == "1"
        steps(folder)[step]()
        assert contents(folder) == whole, k


def test_an_interrupted_removal_is_known_as_ours(tmp_path: Path) -> None:
    """At whichever file it stops, the rest is removed the next time."""
    for k in range(1, 9):
        folder = tmp_path / f"{k}.partial"
        folder.mkdir()
        mark(folder)
        for name in "abcd":
            (folder / name).mkdir()
            (folder / name / "file").touch()
        with failing_disk(tmp_path, k, errno.EIO, lasting=True):
            discard(folder)
        discard(folder)
        assert not folder.exists()


class Shape(BaseModel):
    name: str
    numbers: list[float]


WHOLE = json.dumps({"name": "é", "numbers": [1, 2.5]}, indent=2).encode()


@given(cut=st.integers(0, len(WHOLE) - 1))
def test_a_file_that_is_cut_is_named(tmp_path: Path, cut: int) -> None:
    (tmp_path / "small.json").write_bytes(WHOLE[:cut])
    with pytest.raises(UserError, match=r"small\.json: (empty|not JSON \(.*\)); the file is damaged"):
        read_json(tmp_path / "small.json", Shape)


@given(content=st.one_of(st.binary(), st.text().map(str.encode)))
def test_whatever_is_in_a_file_it_is_read_or_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "small.json").write_bytes(content)
    with pytest.raises(UserError, match=r"small\.json: "):
        read_json(tmp_path / "small.json", Shape)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (bytes(512), "empty"),
        (b"[" * 100_000, "recursion limit"),
        (b'{"name": "a", "numbers": [NaN]}', "not JSON"),
        (b'{"name": "a", "numbers": [-Infinity]}', "not JSON"),
        (b'{"name": "a", "numbers": [1, -1e999]}', "numbers.1: the number is larger than any float"),
        (b'{"name": "a", "numbers": ' + b"1" * 5000 + b"}", "number out of range"),
        (b'{"name": "\xff", "numbers": []}', "invalid unicode"),
        (WHOLE.decode().encode("utf-16"), "not JSON"),
        (b'{"name": "a"}', "numbers: Field required"),
        (b'{"name": ["a"], "numbers": []}', "name: Input should be a valid string"),
        (b'{"name": "a", "numbers": {"0": 1}}', "numbers: Input should be a valid list"),
        (b"[]", "the whole: "),
        (b"null", "the whole: "),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "small.json").write_bytes(content)
    with pytest.raises(UserError, match=r"small\.json: .*the file is damaged; restore it from a copy") as raised:
        read_json(tmp_path / "small.json", Shape)
    assert part in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none", list[int], []) == []
    with pytest.raises(UserError, match=r"none: cannot read it \(No such file"):
        read_json(tmp_path / "none", list[int])
    with pytest.raises(UserError, match=r"cannot read it \(Is a directory"):
        read_json(tmp_path, list[int], [])


class CheckpointError(Exception):
    """As torch's CheckpointException: the errors of the ranks are in an attribute."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("CheckpointException ranks:dict_keys([0])")
        self.failures = {0: (error, None)}


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (shutil.Error([("a", "b", "[Errno 30] Read-only file system: 'b'")]), errno.EROFS),
        (CheckpointError(PermissionError(errno.EACCES, "Permission denied", "x")), errno.EACCES),
        (RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing file data/0"), errno.EIO),
        (OSError("1000 requested and 512 written"), errno.EIO),
    ],
)
def test_errors_of_the_file_system_name_the_path_whatever_library_raises_them(
    tmp_path: Path, error: Exception, number: int
) -> None:
    with pytest.raises(OSError) as raised, replacing(tmp_path / "file"):
        raise error
    found = system_error(raised.value)
    assert found is not None and found.errno == number
    line = describe_system_error(found)
    assert "\n" not in line and line.endswith("then run the same command again")
    assert line.startswith(("x: ", f"{tmp_path / 'file'}: "))
    assert not beside(tmp_path / "file").exists()


@pytest.mark.parametrize("error", [ValueError("4"), KeyError("os"), UserError("[Errno 2]"), OSError("no such model")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, replacing(tmp_path / "file"):
        raise error
    assert raised.value is error


def test_a_picture_a_page_and_json_are_known_again(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from yoco_u.plotting import save_png
    from yoco_u.report.page import write_page

    page = '<!doctype html>\n<html><body>\n<footer class="quiet">Written today by yoco-u 0.1.0.</footer>\n</body>\n</html>\n'
    ways: dict[str, Callable[[Path], Any]] = {
        "a.png": lambda path: save_png(Figure(), path),
        "a.html": lambda path: write_page(path, page),
        "a.json": lambda path: write_result(path, {"a": 1}),
    }
    for name, write in ways.items():
        for _ in range(2):
            check_result(tmp_path / name)
            write(tmp_path / name)
    (tmp_path / "mine.json").write_text('{"generator": "mine"}')
    Figure().savefig(tmp_path / "mine.png")
    (tmp_path / "mine.html").write_text("<!doctype html><p>Written by yoco-u 0.1.0.")
    for name in ("mine.json", "mine.png", "mine.html"):
        with pytest.raises(UserError, match="was not made by yoco-u"):
            check_result(tmp_path / name)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no file that nobody has named, nor a folder that is yet to be made in it."""
    places = [tmp_path / "a.json", tmp_path / "to" / "come" / "a.json"]
    for place in places:
        check_place(place)
    assert not list(tmp_path.iterdir())

    def refuse(prefix: str, dir: Path) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir / prefix))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    for place in places:
        with pytest.raises(OSError) as caught:
            check_place(place)
        assert caught.value.filename == str(tmp_path) and caught.value.errno == errno.EROFS


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES])
def test_folders_that_cannot_be_synced_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As on some network drives; a file that cannot be synced is an error everywhere."""
    whole = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "text")
    with replacing_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert contents(tmp_path).keys() == {"file", "folder", "folder/file", "folder/.yoco-u-part"}
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(os.open(tmp_path, os.O_RDONLY)))
    with pytest.raises(OSError, match=f"{os.strerror(number)}.*other"):
        write_text(tmp_path / "other", "text")


@pytest.mark.parametrize("name", [".", "..", "/", "there/.."])
def test_places_without_a_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    for way in (check_part, check_place, NewFolder):
        with pytest.raises(UserError, match="has no name of its own"):
            way(Path(name))
    assert contents(tmp_path) == {"there": "folder"}
