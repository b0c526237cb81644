"""Logits and gradients of every preset: on the device against the CPU in float32, over whole, packed and padded rows."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_phases.check import BFLOAT16_FACTOR, FLOAT32, largest_error, typical_error, verdict, worst
from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.architecture import Architecture, preset
from yoco_u.model import YocoUForCausalLM
from yoco_u.training.forward import batch_loss
from yoco_u.training.parallelize import compile_model

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from models import EXPERTS, build  # models whose every weight is random, so that each shows in the results

__all__ = ["build"]

ROWS, LENGTHS = 2, {"test": 48, "8m": 200}  # a few windows long
GRADIENTS = 10  # times the error of logits that gradients may have, as they have on the CPU: up to 1e-4 against float64
Results = dict[str, Tensor]


def architectures(scale: Scale, size: str) -> dict[str, Architecture]:
    """Those that are checked, by name: presets, and one with a mixture of experts."""
    return {name: preset(name, size) for name in scale.check_presets} | {"experts": preset("yoco_u", size, experts=EXPERTS)}


def check_models(record: Record, scale: Scale, size: str) -> None:
    for name, architecture in architectures(scale, size).items():
        model = build(architecture)
        for kind, inputs in rows(model, LENGTHS[size]).items():
            truth: Results = {}
            for dtype in ("float32", "bfloat16"):
                for part in ("logits", "gradients"):
                    check = _Check(model, inputs, truth, scale.device, dtype, part)
                    record.measure(f"{name} {size}, {kind} rows, {dtype} {part}", check)


def check_compiled(record: Record, scale: Scale) -> None:
    """Training runs compiled blocks: one preset that has a loop and all the rest."""
    model = build(preset("yoco_u", "8m"))
    inputs = rows(model, LENGTHS["8m"])["packed"]
    check = _Check(model, inputs, {}, scale.device, "bfloat16", "gradients", compiled=True)
    record.measure("yoco_u 8m, packed rows, bfloat16 gradients, compiled", check, least=40)


class _Check:
    """Compares a model's results on a device with those on the CPU; `truth` keeps these from check to check."""

    def __init__(
        self, model: YocoUForCausalLM, inputs: dict[str, Tensor], truth: Results, device: str, dtype: str, part: str,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.inputs, self.truth = model, inputs, truth
        self.device, self.dtype, self.part, self.compiled = device, dtype, part, compiled

    def __call__(self) -> Figure:
        part = _logits if self.part == "logits" else _gradients
        truth = self._kept("float32", part)
        if self.dtype == "float32":
            limit = FLOAT32 * (1 if self.part == "logits" else GRADIENTS)
            error, where = worst(self._on_device(part), truth, largest_error)
            return verdict(error, limit, where=where)
        cpu = {name: typical_error(tensor, truth[name]) for name, tensor in self._kept("bfloat16", part).items()}
        found = {name: typical_error(tensor, truth[name]) for name, tensor in self._on_device(part).items()}
        ratios = {name: error / max(cpu[name], 2e-3) for name, error in found.items()}
        name = max(ratios, key=lambda name: ratios[name])
        return verdict(ratios[name], BFLOAT16_FACTOR, where=name, gpu_error=found[name], cpu_error=cpu[name])

    def _kept(self, dtype: str, part: Callable[..., Results]) -> Results:
        prefix = f"{dtype} {self.part} "
        if not any(name.startswith(prefix) for name in self.truth):
            found = part(self.model.to("cpu"), self.inputs, dtype)
            self.truth |= {prefix + name: tensor for name, tensor in found.items()}
        return {name.removeprefix(prefix): tensor for name, tensor in self.truth.items() if name.startswith(prefix)}

    def _on_device(self, part: Callable[..., Results]) -> Results:
        try:
            model: Any = self.model.to(self.device)
            if self.compiled:
                compile_model(model, "on", model.device)
            return {name: tensor.to("cpu") for name, tensor in part(model, self.inputs, self.dtype).items()}
        finally:
            self.model.to("cpu")


def rows(model: YocoUForCausalLM, length: int) -> dict[str, dict[str, Tensor]]:
    """Inputs of each kind: whole rows, rows of several documents, and rows that are padded on their right."""
    tokens = torch.randint(model.config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(1))
    begins = torch.zeros(ROWS, length, dtype=torch.long)
    begins[0, [0, 1, length // 2]] = 1
    begins[1, [0, length - 3]] = 1
    ends = torch.tensor([[length], [length // 3]])
    real = (torch.arange(length) < ends).long()
    return {
        "whole": {"input_ids": tokens},
        "packed": {"input_ids": tokens, "document_ids": begins.cumsum(1)},
        "padded": {"input_ids": tokens, "attention_mask": real},
    }


def _forward(model: Any, inputs: dict[str, Tensor], dtype: str) -> Any:
    there = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model(**there, use_cache=False)


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Tensor], dtype: str) -> Results:
    """Logits of all tokens that are no padding, (tokens, vocab)."""
    logits = _forward(model, inputs, dtype).logits.to("cpu").flatten(0, 1)
    real = inputs.get("attention_mask")
    return {"logits": logits if real is None else logits[real.flatten() != 0]}


def _gradients(model: Any, inputs: dict[str, Tensor], dtype: str) -> Results:
    """Gradients of the mean loss, by parameter; those of parameters that the loss does not depend on are left out.

    Padded rows go the way of any model of transformers, the others that of our trainer.
    """
    model.zero_grad(set_to_none=True)
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None:
        _forward(model, inputs | {"labels": tokens.masked_fill(mask == 0, -100)}, dtype).loss.backward()
    else:
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        documents = inputs.get("document_ids", torch.ones_like(tokens))
        batch = {"input_ids": tokens, "shift_labels": targets, "document_ids": documents}
        batch_loss(model, batch, model.device, dtype, None).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    model.zero_grad(set_to_none=True)
    return found
