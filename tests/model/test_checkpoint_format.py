"""docs/checkpoint-format.md names every tensor, and only those."""

import re
from pathlib import Path

import pytest
import torch

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import LOOPED, STAGES, preset

DOCS = Path(__file__).parents[2] / "docs"


def documented_tensors() -> set[str]:
    text = (DOCS / "checkpoint-format.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))


def tensor_names(name: str, **settings: object) -> set[str]:
    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(preset(name, "test", **settings)))
    return {re.sub(r"stages\.\d+", "stages.S", re.sub(r"layers\.\d+", "layers.L", key)) for key in model.state_dict()}


EXPERTS = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def all_names() -> set[str]:
    found: set[str] = set()
    for name in STAGES:
        gate = {"loop_gate": 0.1} if name in LOOPED else {}
        found |= tensor_names(name, qk_norm=True, **gate) | tensor_names(name, experts=EXPERTS)
        if name != "yoco_retention":
            found |= tensor_names(name, attention_bias=True)
    return found


def test_every_tensor_is_documented(all_names: set[str]) -> None:
    assert all_names - documented_tensors() == set()


def test_every_documented_tensor_exists(all_names: set[str]) -> None:
    assert documented_tensors() - all_names == set()
