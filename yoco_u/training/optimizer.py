"""AdamW, the parameters that weight decay applies to, and the learning rate of every step."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from yoco_u.training.settings import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all parameters that are trained, with weight decay on matrices that multiply activations.

    Embeddings (and an LM head tied to them), norms, loop gates and ParScale prefixes do not decay.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = {id(parameter) for parameter in _matrices(model)}
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
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
    """The learning rate of step `step` = 0 .. steps - 1.

    With s = step + 1, peak P, w steps of warm-up, d steps of decay and final share f, the rate is

    - P s / w while s < w,
    - P until s = steps - d (with `cosine` that is w, so the decay follows the warm-up at once),
    - then P (f + (1 - f) c), where c falls from 1 to 0 over the last d steps: as half a cosine, or linearly with `wsd`.
    """
    done = step + 1
    if done < config.warmup_steps:
        return config.learning_rate * done / config.warmup_steps
    decay = config.decay_steps(steps)
    progress = max(0.0, 1 - (steps - done) / decay)  # from 0 at the beginning of the decay to 1 at the last step
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * remaining)
