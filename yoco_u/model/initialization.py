"""The initial values of all weights, in one place."""

import math

import torch
from torch import nn
from transformers import initialization as init

from yoco_u.model.blocks import LoopedStack
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.feed_forward import ExpertMixture
from yoco_u.model.layers import Biased, ResidualLinear, RMSNorm


@torch.no_grad()
def initialize(module: nn.Module, config: YocoUConfig) -> None:
    """Initialise one module's own parameters; transformers calls this for every module that no checkpoint has filled.

    - Matrices: normal, std `initializer_range`, by default 1 / sqrt(hidden_size): 0.02 at the paper's 2560.
    - Matrices that write to the residual stream: std divided by sqrt(2 x unrolled depth). Unrolled depth is layers x loops,
      not layers, because a block of a stage looped T times adds to the stream T times.
    - Norms: 1. Biases: 0. Loop gates: the stage's `loop_gate`. ParScale prefixes: like matrices.
    """
    std = config.initializer_range
    assert std is not None

    def residual_std() -> float:
        return std / math.sqrt(2 * config.architecture.unrolled_layers)

    match module:
        case ResidualLinear():
            init.normal_(module.weight, std=residual_std())
        case nn.Linear() | nn.Embedding():
            init.normal_(module.weight, std=std)
        case RMSNorm():
            init.ones_(module.weight)
        case ExpertMixture():
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=residual_std())
            init.zeros_(module.choice_bias)
            init.zeros_(module.tokens_per_expert)
        case Biased():
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, std=std)  # ParScale's prefixes
        case LoopedStack() if module.loop_gates is not None:
            init.constant_(module.loop_gates, module.gate_init)
        case _:
            pass
