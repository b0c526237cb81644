"""yoco-u: the open implementation of Universal YOCO (arXiv 2604.01220).

Importing the package registers its models with transformers, which loads torch. Only the command line goes without: there every
command loads what it needs, and `yoco-u --help` or `yoco-u plan` need neither. Public names are loaded when they are used.
"""

import importlib
import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def _is_command_line() -> bool:
    """Whether this process is `yoco-u` or `python -m yoco_u.cli`."""
    return Path(sys.argv[0]).stem == "yoco-u" or ("-m", "yoco_u.cli") in pairwise(sys.orig_argv)


if not _is_command_line():
    importlib.import_module("yoco_u.model")
