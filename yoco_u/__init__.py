"""yoco-u: the open implementation of Universal YOCO (arXiv 2604.01220).

Importing the package is quick and loads neither torch nor transformers. Its names are loaded when they are used, and its models
are registered with transformers as soon as transformers' Auto classes are loaded, whether before or after this package.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from yoco_u.version import __version__

if TYPE_CHECKING:
    from yoco_u.architecture import Architecture, Stage
    from yoco_u.inference import LLM, SamplingParams
    from yoco_u.model import YocoUCache, YocoUConfig, YocoUForCausalLM, YocoUModel

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

_HOMES = {
    "architecture": ("Architecture", "Stage"),
    "inference": ("LLM", "SamplingParams"),
    "model": ("YocoUCache", "YocoUConfig", "YocoUForCausalLM", "YocoUModel"),
}

# transformers imports torchao wherever it is installed, and that warns of its parts for GPUs that are missing.
for _logger in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_logger).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"yoco_u.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_models(_: Any) -> None:
    importlib.import_module("yoco_u.model")


register_post_import_hook(_register_models, "transformers.models.auto.modeling_auto")
