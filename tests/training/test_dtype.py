"""Training in the dtype of the machine, and going on in it on another one."""

from pathlib import Path
from typing import Any

import pytest
from training_runs import deterministic, run_config

from yoco_u import device
from yoco_u.errors import UserError
from yoco_u.training import train, trainer
from yoco_u.training.run_folder import read_run_config


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 take seconds where it is only said that the machine computes in it."""
    monkeypatch.setattr(trainer, "gemm_rate", lambda device, dtype: 1e9)


ONE_STEP = {"steps": 1, "optimizer_warmup_steps": 0}


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool, dtype: str) -> None:
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: multiplies)
    train(run_config(dataset, **ONE_STEP, dtype="auto"), tmp_path / "auto", progress=False)
    train(run_config(dataset, **ONE_STEP, dtype=dtype), tmp_path / "given", progress=False)
    assert read_run_config(tmp_path / "auto") == read_run_config(tmp_path / "given")
    assert deterministic(tmp_path / "auto") == deterministic(tmp_path / "given")


@pytest.mark.parametrize("began", [True, False])
def test_goes_on_as_it_began(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: bool) -> None:
    settings: dict[str, Any] = ONE_STEP | {"dtype": "auto"}
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: began)
    train(run_config(dataset, **settings), tmp_path, progress=False)
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: not began)
    (tmp_path / "summary.json").unlink()
    train(run_config(dataset, **settings), tmp_path, progress=False)
    assert read_run_config(tmp_path).training.dtype == ("bfloat16" if began else "float32")
    with pytest.raises(UserError, match=r"training\.dtype"):
        train(run_config(dataset, **ONE_STEP, dtype="float32" if began else "bfloat16"), tmp_path, progress=False)
