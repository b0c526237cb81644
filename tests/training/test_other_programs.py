"""Training beside other programs, whose use of the cores is made up."""

from pathlib import Path

import pytest
import torch
from training_runs import losses, run_config

from yoco_u.free_cores import FreeCores
from yoco_u.training import train
from yoco_u.training.other_programs import OtherPrograms, minding_others


def test_a_run_that_may_follows(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer threads in some steps, as many as before in the end, and the same losses but for rounding."""
    train(run_config(dataset), tmp_path / "alone", progress=False)
    monkeypatch.setattr(torch, "set_num_threads", (used := []).append)
    looks = iter([2, 1, 1, 2, 1, 1])
    monkeypatch.setattr(FreeCores, "threads", lambda _: next(looks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1] if used else 2)
    train(run_config(dataset, follow_free_cores=True), tmp_path / "beside", progress=False)
    assert used == [1, 2, 1, 2]
    assert losses(tmp_path / "beside") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_a_run_that_may_not_says_once_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("the number of threads was changed"))
    said: list[str] = []
    others = OtherPrograms(False, said.append)
    for looks, messages in [([1] * 9 + [2] + [None, 1] * 9, 0), ([1], 1), ([2] + [1] * 30, 1)]:
        for free in looks:
            monkeypatch.setattr(FreeCores, "threads", lambda _, free=free: free)
            others.mind()
        assert len(said) == messages
    assert "training.follow_free_cores=true" in said[0]


def test_a_gpu_needs_no_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FreeCores, "threads", lambda _: pytest.fail("looked"))
    with minding_others(torch.device("cuda"), True, lambda _: None) as mind:
        mind()
