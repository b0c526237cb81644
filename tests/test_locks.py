"""Processes that write the same place at once: each write is whole, and what one left that was killed stops nobody."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from yoco_u.files import beside, discard, replacing_folder
from yoco_u.locks import lock, unlock

WRITER = """
import sys
from pathlib import Path
from yoco_u.files import replacing_folder, write_json

place, who = Path(sys.argv[1]), sys.argv[2]
for turn in range(15):
    with replacing_folder(place / "model") as folder:
        for part in range(4):
            (folder / str(part)).write_text(f"{who} {turn}")
    write_json(place / "report.json", {"who": [who] * 1000})
"""
FILLING = """
import sys, time
from pathlib import Path
from yoco_u.files import replacing_folder

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
    assert held is not None and lock(path) == held
    path.unlink()
    path.touch()
    other = lock(path)
    assert other not in (None, held)
    unlock(held)
    unlock(other)
    unlock(None)
