"""yoco-u: the open implementation of Universal YOCO (arXiv 2604.01220).

Importing the package is quick and loads neither torch nor transformers, whoever imports it. Its names are loaded when they are
used. transformers' Auto classes know its models from then on, whether they are loaded before or after.
"""

import importlib
import logging
import os
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

# Threads that wait for the others at the end of a kernel spin on their cores, by default for milliseconds. When other programs
# run too, that takes the cores from those who are waited for. OpenMP reads this when torch is loaded, and never again.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # about 200 microseconds

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


class _ConfigOnDemand:
    """Stands in for `YocoUConfig` with transformers' Auto classes until one of our models is asked for.

    Loading `yoco_u.model` while transformers is itself being loaded would run into a circular import. It registers the real
    classes in the place of this one.
    """

    model_type = "yoco_u"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("yoco_u.model").YocoUConfig(*args, **kwargs)

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("yoco_u.model").YocoUConfig.from_dict(*args, **kwargs)


def _register(configuration_auto: Any) -> None:
    configuration_auto.AutoConfig.register("yoco_u", _ConfigOnDemand, exist_ok=True)


register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
