"""Small models for the tests, with weights large enough that every part of the forward pass shows in the logits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from yoco_u import Architecture, YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import STAGES, preset

PRESETS = tuple(name for name in STAGES if name not in ("deep", "deeper"))  # those are yoco with more layers
EVERYTHING = {
    "qk_norm": True,
    "rope_cross": True,
    "loop_gate": 0.3,
    "tie_word_embeddings": True,
    "global_kvs": 2,
    "attention_bias": True,
}
EXPERTS = {"num_experts": 8, "experts_per_token": 3, "shared_experts": 1, "intermediate_size": 16}


def architecture(name: str = "yoco_u", **settings: Any) -> Architecture:
    if name == "parscale" and "parallel" not in settings:
        settings.setdefault("prefix_tokens", 5)
    if "global_kvs" in settings:  # small variants have fewer cross layers
        settings["global_kvs"] = min(settings["global_kvs"], settings.get("layers", 4) // 2)
    return preset(name, "test", **settings)


def build(arch: Architecture, seed: int = 0, **config: Any) -> YocoUForCausalLM:
    """A model in eval mode whose parameters are all random, norms, gates, prefixes and choice biases included."""
    with no_init_weights():
        model = YocoUForCausalLM(YocoUConfig.from_architecture(arch, **config)).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("_bias") and "choice" not in name:
                tensor.copy_(0.5 * noise)
            elif "loop_gates" in name:
                tensor.copy_(0.4 + 0.2 * noise)
            elif "choice_bias" in name:
                tensor.copy_(0.1 * noise)
            elif "embed_tokens" in name or "prefix" in name:
                tensor.copy_(noise)
            elif "tokens_per_expert" in name:
                tensor.zero_()
            else:
                fan_in = tensor.shape[-2] if tensor.ndim == 3 else tensor.shape[-1]
                tensor.copy_(1.2 * noise * fan_in**-0.5)
    return model


def tokens(batch: int, length: int, vocab: int = 96, seed: int = 1) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter; zeros where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Every gradient within `relative` of that tensor's own largest expected entry."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        error = float((actual[name].to(gradient.dtype) - gradient).abs().max())
        assert error <= relative * scale + 1e-12, f"{name}: off by {error:.2e}, largest entry {scale:.2e}"
