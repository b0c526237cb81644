"""yoco-u: the open implementation of Universal YOCO (arXiv 2604.01220)."""

# ruff: noqa: E402
import logging

# transformers imports torchao wherever it is installed, and that warns of its parts for GPUs that are missing.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

from yoco_u.architecture import Architecture, Stage
from yoco_u.inference import LLM, SamplingParams
from yoco_u.model import YocoUCache, YocoUConfig, YocoUForCausalLM, YocoUModel
from yoco_u.version import __version__

__all__ = [
    "LLM",
    "Architecture",
    "SamplingParams",
    "Stage",
    "YocoUCache",
    "YocoUConfig",
    "YocoUForCausalLM",
    "YocoUModel",
    "__version__",
]
