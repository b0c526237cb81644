"""Building the kernels among processes that may be killed at any moment, and beside other environments."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import ninja
import pytest
import torch
from filelock import FileLock
from torch.utils import cpp_extension

from yoco_u.device import cxx_compiler
from yoco_u.inference.kernels import cpu
from yoco_u.inference.kernels.cpu import compiled

pytestmark = pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the extensions that are built, in a folder of the test's own and without a compiler's work."""
    found: list[str] = []
    monkeypatch.delenv("YOCO_U_KERNELS", raising=False)
    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda name, verbose: str(_made(tmp_path / name)))
    monkeypatch.setattr(cpp_extension, "load", lambda name, *_, **__: found.append(name))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_the_lock_of_a_killed_process_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[str]
) -> None:
    (left_behind := _made(tmp_path / cpu._name(str(cxx_compiler()))) / "lock").touch()

    def load(*_: Any, **__: Any) -> None:
        assert not left_behind.exists()
        builds.append("built")

    monkeypatch.setattr(cpp_extension, "load", load)
    assert compiled.__wrapped__()
    assert builds == ["built"]


def test_it_says_that_it_builds_and_builds_once(builds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled.__wrapped__() and compiled.__wrapped__()
    assert len(builds) == 1
    assert capsys.readouterr().err.count("Building the C++ kernels for this CPU, once") == 1


def test_a_build_that_failed_is_said_done_without_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, builds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("pages of output\nninja: out of luck")

    with monkeypatch.context() as broken:
        broken.setattr(cpp_extension, "load", fail)
        assert not compiled.__wrapped__()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "the C++ kernels could not be built (ninja: out of luck): decoding is slower than it could be"
    )
    assert compiled.__wrapped__()
    assert len(builds) == 1


def test_the_error_of_the_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error building extension 'x': c++ -c x.cpp\nx.cpp:1: error: no disk\n^\nninja: build stopped.")

    with monkeypatch.context() as broken:
        broken.setattr(cpp_extension, "load", fail)
        assert not compiled.__wrapped__()
    assert "could not be built (x.cpp:1: error: no disk): " in capsys.readouterr().err
    (other := tmp_path / "c++").write_text("#!/bin/sh\necho c++: error: no option -march=native >&2; exit 1")
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert not compiled.__wrapped__()
    assert "could not be built (c++: error: no option -march=native): " in capsys.readouterr().err


def test_torch_builds_with_our_compiler_and_ninja_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[str]
) -> None:
    """Neither is c++ there, which torch looks for, nor is the environment of Python activated, in which ninja is."""
    real, path = str(cxx_compiler()), str(tmp_path / "bin")
    Path(path).mkdir()
    (compiler := tmp_path / "bin" / "g++").symlink_to(real)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", path)

    def load(name: str, *_: Any, **__: Any) -> None:
        assert cpp_extension.get_cxx_compiler() == str(compiler)
        assert os.environ["PATH"] == os.pathsep.join([path, ninja.BIN_DIR]) and cpp_extension.is_ninja_available()
        builds.append(name)

    monkeypatch.setattr(cpp_extension, "load", load)
    assert compiled.__wrapped__() and len(builds) == 1
    assert os.environ["PATH"] == path and "CXX" not in os.environ


def test_what_is_built_is_loaded_without_writing_and_built_again_when_it_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[str]
) -> None:
    assert compiled.__wrapped__()
    (lock,) = tmp_path.glob("*.lock")
    with FileLock(lock):  # in a cache that cannot be written to, nobody gets the lock
        assert compiled.__wrapped__()
    assert len(builds) == 1
    (damaged := lock.with_suffix("") / "object.o").touch()

    def load(path: Path) -> None:
        if damaged.exists():
            raise OSError(f"{path}: file too short")

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert compiled.__wrapped__() and compiled.__wrapped__()
    assert len(builds) == 2


def test_who_waits_for_another_process_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = cpu._name(str(cxx_compiler()))
    (other := FileLock(tmp_path / f"{name}.lock")).acquire()

    class Waiting(FileLock):
        def acquire(self, timeout: float | None = None, **settings: Any) -> Any:
            if timeout is None:
                assert "Another process is building" in capsys.readouterr().err and not builds
                other.release()
            return super().acquire(timeout, **settings)

    monkeypatch.setattr(cpu, "FileLock", Waiting)
    assert compiled.__wrapped__() and builds == [name]


@pytest.mark.parametrize("change", ["source", "header", "flag", "cpu", "torch", "python"])
def test_what_differs_is_built_apart(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[str]) -> None:
    assert compiled.__wrapped__()
    sources = tmp_path / "sources"
    shutil.copytree(Path(cpu.__file__).parent, sources)
    monkeypatch.setattr(cpu, "_FOLDER", sources)
    assert compiled.__wrapped__() and len(builds) == 1  # the same sources in another checkout
    if change in ("source", "header"):
        with (sources / {"source": "pointwise.cpp", "header": "vectors.h"}[change]).open("a") as file:
            file.write("// changed")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.13.1")
    elif change == "python":
        monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    else:
        flag = {"flag": "-O2", "cpu": "-march=x86-64-v2"}[change]
        monkeypatch.setattr(cpu, "_FLAGS", [*cpu._FLAGS, flag])
    assert compiled.__wrapped__()
    assert len(set(builds)) == 2
