"""Building the kernels among processes that may be killed at any moment, and beside other environments."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
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
