"""A saved model trained further by a loop of the user's own, as the README says, and used again."""

from pathlib import Path

import pytest
import torch
from models import architecture, build, tokens
from transformers import AutoModelForCausalLM

from yoco_u import YocoUForCausalLM
from yoco_u.inference import Engine, EngineSettings, SamplingParams


@pytest.mark.parametrize("name", ["yoco_u", "yoco_retention"])
def test_a_saved_model_can_be_trained_further(tmp_path: Path, name: str) -> None:
    build(architecture(name, layers=2)).save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before").train()
    batch = tokens(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    model.save_pretrained(tmp_path / "after")

    tuned = YocoUForCausalLM.from_pretrained(tmp_path / "after").eval()
    engine = Engine(tuned, None, EngineSettings(dtype="float32", cache_tokens=512))
    row = batch[0].tolist()
    request = engine.add(row[:8], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    while not request.finished:
        engine.step()
    assert request.outputs[0].token_ids == row[8:]  # it has learned the row by heart
