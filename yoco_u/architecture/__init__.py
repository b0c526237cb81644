"""A model as plain data: a list of stages, from which everything else about it follows. Nothing here needs torch.

Settings go in, as keyword arguments or from a config file, and a checked `Architecture` comes out. Start at `stages.py`; the
paper's architectures are in `presets.py`.
"""

from yoco_u.architecture.presets import LOOPED, SIZES, STAGES, preset
from yoco_u.architecture.stages import (
    Architecture,
    Attention,
    MixtureOfExperts,
    ParallelStreams,
    RotaryScaling,
    Slot,
    Stage,
)

__all__ = [
    "LOOPED",
    "SIZES",
    "STAGES",
    "Architecture",
    "Attention",
    "MixtureOfExperts",
    "ParallelStreams",
    "RotaryScaling",
    "Slot",
    "Stage",
    "preset",
]
