"""Which architecture vLLM is asked to run, and whether it can. This module needs neither vLLM nor torch."""

from typing import Any

from yoco_u.architecture import Architecture
from yoco_u.errors import UserError


def served_architecture(config: Any) -> Architecture:
    """The architecture of a configuration, at the loop count that `--hf-overrides '{"num_loops": 5}'` asks for, if it does.

    Args:
        config: a `YocoUConfig`. vLLM sets the overrides as attributes on it.

    Raises:
        UserError: if `num_loops` is no loop count, or vLLM cannot express the architecture.
    """
    architecture: Architecture = config.architecture
    loops = getattr(config, "num_loops", None)
    if loops is not None:
        architecture = architecture.with_loops(loops)
    if architecture.parallel is not None:
        raise UserError(
            "this checkpoint has ParScale streams (parallel), whose learned key prefixes vLLM's caches cannot hold; "
            "run it in our engine: yoco-u generate"
        )
    if any(stage.attention == "retention" for stage in architecture.stages):
        raise UserError(
            "this checkpoint has gated retention, for which the plugin has no cache; run it in our engine: yoco-u generate"
        )
    return architecture
