"""AdamW, which parameters decay, and the learning rate of every step."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from yoco_u.training.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all parameters; only matrices that multiply activations decay.

    Embeddings (an LM head tied to them included), norms, loop gates and ParScale prefixes do not.
    """
    decayed = {id(parameter) for parameter in _matrices(model)}
    groups: list[dict[str, object]] = [
        {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        is_prefix = name.rpartition(".")[2].startswith("prefix_")
        if parameter.ndim >= 2 and id(parameter) not in embeddings and not is_prefix:
            yield parameter


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` = 0 .. steps - 1.

    With peak P, warm-up w, decay d and final share f, after s = step + 1 steps: P s / w while s < w; then P until s = steps - d
    (which is w with `cosine`); then P (f + (1 - f) c), where c falls from 1 to 0 over the last d steps, as half a cosine or
    (`wsd`) linearly.
    """
    done = step + 1
    if done < config.warmup_steps:
        return config.learning_rate * done / config.warmup_steps
    decay = config.decay_steps(steps)
    progress = max(0.0, 1 - (steps - done) / decay)  # 0 .. 1 through the decay
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * remaining)
