"""Checksums notice any damage to any file, and agree with those of coreutils."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoco_u.checksums import SUMS, verify_checksums, write_checksums
from yoco_u.files import DamagedFile

DAMAGES = ("flip", "cut", "longer", "empty", "missing")


def damage(path: Path, how: str, at: int = 0, bit: int = 0) -> None:
    """Change a file; `at` and `bit` choose what is flipped, or where it is cut."""
    data = bytearray(path.read_bytes())
    at %= max(1, len(data))
    if how == "missing":
        path.unlink()
        return
    if how == "flip":
        data[at] ^= 1 << bit
    path.write_bytes({"flip": data, "cut": data[:at], "longer": data + b"x", "empty": b""}[how])


@given(
    contents=st.lists(st.binary(min_size=1, max_size=100), min_size=1, max_size=4),
    which=st.integers(0, 99),
    how=st.sampled_from(DAMAGES),
    at=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_every_damage_is_noticed_and_the_file_named(
    contents: list[bytes], which: int, how: str, at: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    files = [folder / f"sub-{number % 2}" / f"file {number}" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    write_checksums(folder)
    assert verify_checksums(folder, "copy it again")
    broken = [*files, folder / SUMS][which % (len(files) + 1)]
    if broken.name == SUMS and how == "missing":
        return
    damage(broken, how, at, bit)
    with pytest.raises(DamagedFile) as raised:
        verify_checksums(folder, "copy it again")
    message = str(raised.value)
    assert message.endswith("; copy it again") and "\n" not in message
    if broken.name != SUMS:
        assert message.startswith(f"{broken}: ")
    else:  # a changed name or digest shows as a file that is missing or differs
        assert str(folder) in message


def test_a_folder_without_checksums_is_taken_as_it_is(tmp_path: Path) -> None:
    assert not verify_checksums(tmp_path, "")


def test_checksums_of_earlier_versions_have_no_count(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    count, *sums = (tmp_path / SUMS).read_text().splitlines(keepends=True)
    assert count == "# files: 2\n"
    (tmp_path / SUMS).write_text("".join(sums))
    assert verify_checksums(tmp_path, "")
    (tmp_path / SUMS).write_text(count + sums[0])
    with pytest.raises(DamagedFile, match="it has 1 of 2 checksums; copy it again"):
        verify_checksums(tmp_path, "copy it again")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_coreutils_agree(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 10_000)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c d").write_bytes(b"")
    write_checksums(tmp_path)
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "a: OK\nb/c d: OK\n"
