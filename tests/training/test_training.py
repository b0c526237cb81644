"""Runs in one process: every architecture learns, and what must not change a result does not."""

from pathlib import Path

import pytest
from training_runs import losses, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from yoco_u.architecture import STAGES
from yoco_u.training import train


@pytest.mark.parametrize("name", STAGES)
def test_every_preset_learns_and_generates(name: str, dataset: Path, tmp_path: Path) -> None:
    summary = train(run_config(dataset, name, steps=12, evaluate_every=12, save_every=12), tmp_path, progress=False)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3
    assert summary["steps"] == 12 and summary["validation"]["loss"] < losses(tmp_path)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer("def add", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > tokens["input_ids"].shape[1]
