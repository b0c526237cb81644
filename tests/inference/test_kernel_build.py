"""Building the kernels among processes that may be killed at any moment."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

from yoco_u.inference.kernels.cpu import compiled


def test_the_lock_of_a_killed_process_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda name, verbose: str(tmp_path / name))
    left_behind = tmp_path / "yoco_u_kernels" / "lock"
    left_behind.parent.mkdir()
    left_behind.touch()
    loaded: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> None:
        assert not left_behind.exists()
        loaded.append(name)

    monkeypatch.setattr(cpp_extension, "load", load)
    assert compiled.__wrapped__()
    assert loaded == ["yoco_u_kernels"]
