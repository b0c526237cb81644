"""Models and batches for the tests of `yoco_u.analysis`."""

from typing import Any

import numpy as np
import torch
from models import EXPERTS, architecture, build, tokens

from yoco_u import YocoUForCausalLM
from yoco_u.data import Batch, as_batch

N = 17
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in ("transformer", "yoco", "yoco_retention", "deep", "deeper", "parscale")
}
LOOPED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("yoco_u", "universal_transformer", "rins", "upper_loop", "upper_loop_without_shared_kv")},
    "gated": ("yoco_u", {"loop_gate": 0.3}),
    "gated upper loop": ("upper_loop", {"loop_gate": 0.3, "rope_cross": True, "qk_norm": True}),
    "experts": ("yoco_u", {"experts": EXPERTS}),
    "tied": ("rins", {"tie_word_embeddings": True}),
}
VARIANTS = PLAIN | LOOPED


def make(variant: str, **settings: Any) -> YocoUForCausalLM:
    """A model in float64, or in float32 with experts, whose grouped product torch does not have in float64."""
    name, options = VARIANTS[variant]
    model = build(architecture(name, **options | settings))
    return model if model.config.experts else model.double()


def batch(rows: int = 1, length: int = N, seed: int = 1) -> Batch:
    """Rows of one document each."""
    return as_batch(tokens(rows, length + 1, seed=seed).numpy(), eot_id=-1)


def packed(documents: list[list[int]]) -> Batch:
    """One row of several documents, each beginning with token 0."""
    row = [token for document in documents for token in (0, *document)]
    return as_batch(np.array([[*row, 0]]), eot_id=0)


def tolerance(model: YocoUForCausalLM) -> float:
    """Even a float64 model is only exact to float32, because rotary angles and retention are computed in float32."""
    return 1e-4 if model.dtype == torch.float64 else 2e-3
