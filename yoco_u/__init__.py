"""yoco-u: the open implementation of Universal YOCO (arXiv 2604.01220)."""

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
