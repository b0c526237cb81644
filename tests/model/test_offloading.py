"""Weights that accelerate loads when a module is called: no parameter is read past its own module's forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from models import EVERYTHING, EXPERTS, PRESETS, architecture, build, tokens

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "everything": ("yoco_u", EVERYTHING),
    "experts": ("yoco_u", {"experts": EXPERTS}),
    "experts with streams": ("parscale", {"experts": EXPERTS}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded_weights_give_the_same_logits(variant: str, tmp_path: Path) -> None:
    name, settings = VARIANTS[variant]
    ids = tokens(2, 13)
    mask = (torch.arange(13) >= torch.tensor([[0], [4]])).long()
    call = {"attention_mask": mask, "labels": ids}
    expected = build(architecture(name, layers=2, **settings))(ids, **call)
    model = build(architecture(name, layers=2, **settings))
    if variant == "experts":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    out = model(ids, **call)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(model(ids, **call, return_logits=False).loss, expected.loss)
