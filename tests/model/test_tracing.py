"""torch.compile without a graph break, and torch.export: the same logits as the model itself, whatever a call says."""

from typing import Any

import pytest
import torch
from models import EVERYTHING, EXPERTS, PRESETS, architecture, assert_same_gradients, build, gradients, tokens
from torch import Tensor

from yoco_u import YocoUForCausalLM
from yoco_u.architecture import LOOPED

N = 13
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "everything": ("yoco_u", EVERYTHING),
    "experts": ("yoco_u", {"experts": EXPERTS | {"auxiliary_loss_weight": 0.1}}),
}


def make(variant: str) -> YocoUForCausalLM:
    name, settings = VARIANTS[variant]
    loops = {"loops": 2} if name in LOOPED else {}
    return build(architecture(name, layers=2, **loops, **settings), use_cache=False)


def mask() -> Tensor:
    return (torch.arange(N) >= torch.tensor([[0], [4]])).long()


def calls() -> dict[str, dict[str, Any]]:
    positions = (torch.arange(N) % 8).expand(2, -1)
    return {
        "masked, some kept": {"attention_mask": mask(), "logits_to_keep": torch.tensor([5, 12])},
        "packed, the last kept": {"position_ids": positions, "logits_to_keep": 2},
        "all ones": {"attention_mask": torch.ones(2, N), "num_loops": 1},
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported(variant: str) -> None:
    model, ids = make(variant), tokens(2, N)
    chosen = calls() if variant == "experts" else {"masked": calls()["masked, some kept"]}
    for name, call in chosen.items():
        expected = model(ids, **call).logits
        program = torch.export.export(model, (ids,), call)
        torch.testing.assert_close(program.module()(ids, **call).logits, expected, msg=name)


def test_one_graph_of_a_whole_training_step() -> None:
    model, ids = make("experts").train(), tokens(2, N)
    call = {"attention_mask": mask(), "labels": ids, "num_items_in_batch": torch.tensor(20)}
    expected = gradients(model, model(ids, **call).loss)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same_gradients(gradients(model, compiled(ids, **call).loss), expected, 1e-4)


def test_an_exported_program_of_any_length_stops_at_a_hole() -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (ids,), {"attention_mask": mask()}, dynamic_shapes=(free, free)).module()
    longer = tokens(3, 40)
    holed = torch.ones_like(longer)
    holed[0, :9] = holed[2, 30:] = 0
    expected = model(longer, attention_mask=holed).logits
    torch.testing.assert_close(program(longer, attention_mask=holed).logits, expected)
    holed[1, 7] = 0
    with pytest.raises(RuntimeError, match="padding between tokens of one document"):
        program(longer, attention_mask=holed)
