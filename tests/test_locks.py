"""Writers of the same place at once, processes and threads: each write is whole, and who was killed stops nobody."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from yoco_u.files import read_json, write_json
from yoco_u.folders import beside, check_place, discard, replacing_folder
from yoco_u.locks import lock, unlock

WRITER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from yoco_u.files import write_json
from yoco_u.folders import replacing_folder

place, who = Path(sys.argv[1]), sys.argv[2]

def write(thread):
    for turn in range(6):
        with replacing_folder(place / "model") as folder:
            for part in range(4):
                (folder / str(part)).write_text(f"{who} {thread} {turn}")
        write_json(place / "report.json", {"who": [who] * 1000})

with ThreadPoolExecutor() as pool:
    list(pool.map(write, range(2)))
"""
FILLING = """
import sys, time
from pathlib import Path
from yoco_u.folders import replacing_folder

with replacing_folder(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("filling", flush=True)
    time.sleep(3600)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_what_several_processes_write_is_whole(tmp_path: Path) -> None:
    processes = [start(WRITER, tmp_path, who) for who in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    parts = {(tmp_path / "model" / str(part)).read_text() for part in range(4)}
    assert len(parts) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "report.json"]


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns in the midst of everything."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_what_several_threads_write_is_whole_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": [0] * 1000})

    def write(who: int) -> None:
        for _ in range(25):
            write_json(path, {"x": [who] * 1000})

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, who) for who in (1, 2, 3)]
        while not all(writer.done() for writer in writers):
            found = read_json(path, dict[str, list[int]])["x"]
            assert len(found) == 1000 and len(set(found)) == 1
            check_place(path)  # what another writer makes there is not in the way
        assert [writer.result() for writer in writers] == [None] * 3
    assert [it.name for it in tmp_path.iterdir()] == ["a.json"]


def test_a_thread_waits_for_one_that_fills_the_folder(tmp_path: Path) -> None:
    entered = threading.Event()

    def write() -> None:
        with replacing_folder(tmp_path / "model") as folder:
            entered.set()
            (folder / "second").touch()

    with ThreadPoolExecutor() as pool:
        with replacing_folder(tmp_path / "model") as folder:
            (folder / "first").touch()
            other = pool.submit(write)
            assert not entered.wait(0.1)
            assert (folder / "first").exists()
        other.result()
    assert (tmp_path / "model" / "second").exists() and not (tmp_path / "model" / "first").exists()


def test_a_writer_waits_for_one_that_still_removes_the_former_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, removing, go_on = tmp_path / "model", threading.Event(), threading.Event()
    remove = shutil.rmtree

    def slow(path: Path) -> None:
        removing.set()
        assert go_on.wait(60)
        remove(path)

    def write(who: str) -> None:
        with replacing_folder(place) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / who).touch()

    write("first")
    monkeypatch.setattr(shutil, "rmtree", slow)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(write, "second")
        assert removing.wait(60) and (place / "deep" / "second").exists()
        third = pool.submit(write, "third")
        threading.Timer(0.1, go_on.set).start()
        second.result()
        third.result()
    assert [it.name for it in (place / "deep").iterdir()] == ["third"]
    assert [it.name for it in tmp_path.iterdir()] == ["model"]


def test_who_fills_a_folder_is_waited_for_and_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with start(FILLING, place) as other:
        assert other.stdout is not None and other.stdout.readline() == "filling\n"
        discard(beside(place))
        assert (beside(place) / "half").exists()
        threading.Timer(0.2, other.kill).start()
        with replacing_folder(place) as folder:
            assert other.poll() is not None or other.wait() is not None
            (folder / "whole").touch()
    assert (place / "whole").exists() and not (place / "half").exists() and not beside(place).exists()


def test_a_lock_is_of_the_file_that_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    assert lock(path) is None
    path.touch()
    held = lock(path)
    assert held is not None and lock(path) is None
    path.unlink()
    path.touch()
    other = lock(path)
    assert other not in (None, held)
    unlock(held)
    unlock(other)
    unlock(None)
