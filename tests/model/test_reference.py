"""The model against the slow direct implementation of `reference.py`: logits and gradients, every architecture."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import covering
from models import EXPERTS, PRESETS, architecture, assert_same_gradients, build, gradients, tokens
from reference import reference_logits, reference_loss

from yoco_u import Architecture

pytestmark = pytest.mark.usefixtures("attention_path")
PATHS = ("blocks", "fused")  # of attention

# Rotary angles and retention are float32 by design, so float64 models agree to float32's accuracy in those parts.
# torch's grouped product has no float64, so models with experts run in float32 throughout.
TOLERANCE = {torch.float64: 2e-5, torch.float32: 1e-4}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "qk norm": ("yoco_u", {"qk_norm": True}),
    "rope in the cross-decoder": ("yoco_u", {"rope_cross": True}),
    "qk norm and rope in the cross-decoder": ("yoco", {"rope_cross": True, "qk_norm": True}),
    "two global KVs": ("yoco_u", {"global_kvs": 2}),
    "two global KVs, qk norm, rope, a loop": ("upper_loop", {"global_kvs": 2, "qk_norm": True, "rope_cross": True}),
    "global KVs for groups of unequal size": ("yoco", {"layers": 10, "global_kvs": 3}),
    "biases": ("yoco_u", {"attention_bias": True, "rope_cross": True}),
    "biases, qk norm, two global KVs": ("yoco", {"attention_bias": True, "qk_norm": True, "global_kvs": 2}),
    "loop gate": ("yoco_u", {"loop_gate": 0.3}),
    "loop gate on the upper loop": ("upper_loop", {"loop_gate": 0.3}),
    "loop gate, T=5": ("rins", {"loop_gate": 0.3, "loops": 5}),
    "experts": ("yoco_u", {"experts": EXPERTS}),
    "experts without a shared one": ("transformer", {"experts": EXPERTS | {"shared_experts": 0}}),
    "two shared experts": ("yoco", {"experts": EXPERTS | {"shared_experts": 2}}),
    "tied": ("yoco_u", {"tie_word_embeddings": True}),
    "window 1": ("yoco_u", {"window": 1}),
    "window 3": ("yoco_u", {"window": 3}),
    "window larger than the text": ("yoco_u", {"window": 500}),
    "one key-value head": ("yoco_u", {"num_key_value_heads": 1}),
    "as many key-value heads": ("yoco_retention", {"num_key_value_heads": 4}),
    "other theta and eps": ("yoco_u", {"rope_theta": 500.0, "rms_norm_eps": 1e-3}),
    "three streams": ("parscale", {"parallel": {"streams": 3, "prefix_tokens": 2, "smoothing": 0.1}}),
    "streams with qk norm and experts": ("parscale", {"qk_norm": True, "experts": EXPERTS}),
    "a bare layer of head_dim apart from hidden size": ("yoco_u", {"layers": 2, "head_dim": 6}),
}


def check_logits(arch: Architecture, length: int = 25, **call: Any) -> None:
    model = build(arch).to(_dtype(arch))
    with torch.no_grad():
        actual = model(tokens(1, length), **call).logits[0]
    expected = _expected_logits(arch.model_dump_json(), length, call.get("num_loops"))
    tolerance = TOLERANCE[actual.dtype]
    assert expected.std() > 0.3
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@cache
def _expected_logits(arch_json: str, length: int, loops: int | None) -> torch.Tensor:
    """One truth for both attention paths."""
    arch = Architecture.model_validate_json(arch_json)
    with torch.no_grad():
        weights = _float64(build(arch).to(_dtype(arch)))
        return reference_logits(weights, _unrolled(arch, loops), tokens(1, length)[0].tolist())


@cache
def _expected_gradients(arch_json: str, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the reference and its gradient for every parameter."""
    arch = Architecture.model_validate_json(arch_json)
    model = build(arch).to(_dtype(arch))
    weights = {name: tensor.clone().requires_grad_() for name, tensor in _float64(model).items()}
    if arch.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    loss = reference_loss(weights, arch.model_dump(), tokens(1, length)[0].tolist())
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [weights[n] for n in parameters], allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}
    return loss.detach(), expected


def _dtype(arch: Architecture) -> torch.dtype:
    return torch.float32 if arch.experts else torch.float64


def _float64(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().double() for name, tensor in model.state_dict().items()}


def _unrolled(arch: Architecture, loops: int | None) -> dict[str, Any]:
    """Plain values, with the loop count replaced where the architecture loops, or in the first stage if nowhere."""
    plain = arch.model_dump()
    if loops is not None:
        stages = plain["stages"]
        for stage in [s for s in stages if s["loops"] > 1] or stages[:1]:
            stage["loops"] = loops
    return plain


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str) -> None:
    check_logits(architecture(name))


@pytest.mark.parametrize(("name", "attention_path"), covering(list(OPTIONS), PATHS), indirect=["attention_path"])
def test_every_option(name: str) -> None:
    preset, settings = OPTIONS[name]
    check_logits(architecture(preset, **settings))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 33, 41, 73])
def test_lengths_around_the_window_and_the_band_blocks(length: int) -> None:
    check_logits(architecture("yoco_u", layers=2), length)


def test_retention_over_a_chunk_edge() -> None:
    check_logits(architecture("yoco_retention", layers=2), 131)


@pytest.mark.parametrize(("name", "loops"), covering(PRESETS, [1, 2, 5]))
def test_loops_at_call_time(name: str, loops: int) -> None:
    check_logits(architecture(name, layers=2), 13, num_loops=loops)


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_gated_loops_at_call_time(loops: int) -> None:
    check_logits(architecture("yoco_u", loop_gate=0.3), 13, num_loops=loops)


@pytest.mark.parametrize(("case", "attention_path"), covering([*PRESETS, *OPTIONS], PATHS), indirect=["attention_path"])
def test_gradients(case: str) -> None:
    name, settings = OPTIONS.get(case, (case, {}))
    arch = architecture(name, **({"layers": 2, "window": 3} if name == "yoco_u" else {"layers": 2}) | settings)
    model = build(arch).to(_dtype(arch))
    loss, expected = _expected_gradients(arch.model_dump_json(), 10)
    tolerance = TOLERANCE[model.dtype]

    ids = tokens(1, 10)
    actual = model(ids, labels=ids)
    torch.testing.assert_close(actual.loss, loss, rtol=tolerance, atol=tolerance, check_dtype=False)
    assert_same_gradients(gradients(model, actual.loss), expected, 5 * tolerance)


def test_finite_differences_of_the_loss() -> None:
    """Independent of any autograd: the loss moved along random directions of all parameters."""
    model = build(architecture("yoco_u", loop_gate=0.3, window=5)).double()
    ids = tokens(2, 20)

    def loss() -> torch.Tensor:  # transformers' own loss is float32, too coarse for differences
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    grads = gradients(model, loss())
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
        losses = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p += step * direction[n]
                losses.append(loss())
        slope = (losses[0] - losses[1]) / 2e-6
        with torch.no_grad():
            for n, p in model.named_parameters():
                p += 1e-6 * direction[n]
        expected = sum((direction[n] * g).sum() for n, g in grads.items())
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)
