"""Folders that are replaced: what is there stays until the new one is, whenever the process that replaces it is killed."""

import os
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import pytest
from failing_disk import KILLED, failing_disk

from yoco_u.checksums import keep_changes, verify_checksums, write_checksums
from yoco_u.errors import UserError
from yoco_u.folders import discard, free_name, replacing_folder, settle


def save(path: Path, generation: str) -> None:
    """As a model is saved: what a user has added to the old folder comes along."""
    with replacing_folder(path) as new:
        for name in ("weights", "code"):
            (new / name).write_text(generation)
        (new / "deep").mkdir()
        (new / "deep" / "file").write_text(generation)
        write_checksums(new)
        keep_changes(path, new)


def killed(work: Callable[[], object], folder: Path, at: int) -> bool:
    """Do something in a process that dies at its n-th write to a folder; whether it died, and did not come to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with failing_disk(folder, at, kills=True):
                work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, KILLED)
    return status != 0


def with_a_file_of_a_user(folder: Path) -> Path:
    save(folder / "out", "old")
    (folder / "out" / "deep" / "mine").write_text("years of work")
    return folder


def is_whole(path: Path) -> bool:
    verify_checksums(path, "")
    parts = {(path / name).read_text() for name in ("weights", "code", "deep/file")}
    return len(parts) == 1 and (path / "deep" / "mine").read_text() == "years of work"


def test_killed_at_any_moment_a_folder_is_whole_and_has_what_a_user_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the next process is killed, at any moment, that finds one set aside and nothing in its place."""

    def check(folder: Path) -> None:
        there = [path for path in (folder / "out", folder / "out.yoco-u-former") if path.exists()]
        assert there and all(map(is_whole, there))

    def check_next(folder: Path) -> None:
        save(folder / "out", "newest")
        assert is_whole(folder / "out") and (folder / "out" / "weights").read_text() == "newest"
        assert [path.name for path in folder.iterdir()] == ["out"]

    monkeypatch.setattr(os, "fsync", lambda _: None)  # it takes most of the time
    without = 0
    for at in count(1):
        folder = with_a_file_of_a_user(tmp_path / str(at))
        if not killed(lambda folder=folder: save(folder / "out", "new"), folder, at):  # type: ignore[misc]
            break
        check(folder)
        if not (folder / "out").exists():
            without += 1
            for again in chain(range(1, 5), count(5, 4)):  # it is put back first
                copy = tmp_path / f"{at} {again}"
                shutil.copytree(folder, copy)
                if not killed(lambda copy=copy: save(copy / "out", "newer"), copy, again):  # type: ignore[misc]
                    break
                check(copy)
                check_next(copy)
        check_next(folder)
    assert at > 20 and without == 1


def test_what_is_removed_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """And comes never back, not from what a process left that was killed while it replaced the folder."""
    for at in count(1):
        folder = with_a_file_of_a_user(tmp_path / str(at))
        shutil.copytree(folder / "out", folder / "out.yoco-u-former")
        if not killed(lambda folder=folder: discard(folder / "out"), folder, at):  # type: ignore[misc]
            break
        assert not (folder / "out").exists() or is_whole(folder / "out")
        discard(folder / "out")
        settle(folder / "out")
        assert not list(folder.iterdir())
    assert at > 10


def test_a_new_folder_is_refused_where_a_former_one_has_come_that_is_not_ours(tmp_path: Path) -> None:
    folder = with_a_file_of_a_user(tmp_path / "folder")
    (folder / "out.yoco-u-former").mkdir()
    (folder / "out.yoco-u-former" / "thesis").touch()
    with pytest.raises(UserError, match=r"out\.yoco-u-former: is in the way"):
        save(folder / "out", "new")
    assert is_whole(folder / "out") and (folder / "out.yoco-u-former" / "thesis").exists()
    assert len(list(folder.iterdir())) == 2


def test_the_first_free_name(tmp_path: Path) -> None:
    for name in ("a.b.json", "a.b-2.json", "a.b-3.json", "a.b-4.json"):
        assert free_name(tmp_path / "a.b.json").name == name
        (tmp_path / name).symlink_to("nowhere")
