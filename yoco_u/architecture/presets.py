"""The architectures of the paper by name, and shapes by size: `preset("yoco_u", "100m", loops=5)`."""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any

from pydantic import ValidationError

from yoco_u.architecture.stages import Architecture, Attention, Stage
from yoco_u.config import describe, did_you_mean, parse, shown
from yoco_u.errors import UserError


def transformer(layers: int) -> tuple[Stage, ...]:
    return (Stage(attention="full", layers=layers),)


def yoco(layers: int, attention: Attention = "sliding") -> tuple[Stage, ...]:
    return (Stage(attention=attention, layers=layers // 2), Stage(attention="cross", layers=layers // 2))


def yoco_u(layers: int, loops: int = 3, loop_gate: float | None = None) -> tuple[Stage, ...]:
    looped = Stage(attention="sliding", layers=layers // 2, loops=loops, loop_gate=loop_gate)
    return (looped, Stage(attention="cross", layers=layers // 2))


def universal_transformer(layers: int, loops: int = 2, loop_gate: float | None = None) -> tuple[Stage, ...]:
    return (Stage(attention="full", layers=layers, loops=loops, loop_gate=loop_gate),)


def rins(layers: int, loops: int = 3, loop_gate: float | None = None) -> tuple[Stage, ...]:
    looped = Stage(attention="full", layers=layers // 2, loops=loops, loop_gate=loop_gate)
    return (looped, Stage(attention="full", layers=layers // 2))


def upper_loop(layers: int, loops: int = 3, loop_gate: float | None = None) -> tuple[Stage, ...]:
    looped = Stage(attention="cross", layers=layers // 2, loops=loops, loop_gate=loop_gate)
    return (Stage(attention="sliding", layers=layers // 2), looped)


def upper_loop_without_shared_kv(layers: int, loops: int = 3, loop_gate: float | None = None) -> tuple[Stage, ...]:
    looped = Stage(attention="full", layers=layers // 2, loops=loops, loop_gate=loop_gate)
    return (Stage(attention="sliding", layers=layers // 2), looped)


STAGES: dict[str, Callable[..., tuple[Stage, ...]]] = {
    "transformer": transformer,
    "yoco": yoco,
    "yoco_retention": partial(yoco, attention="retention"),
    "yoco_u": yoco_u,
    "universal_transformer": universal_transformer,
    "rins": rins,
    "upper_loop": upper_loop,
    "upper_loop_without_shared_kv": upper_loop_without_shared_kv,
    "deep": yoco,
    "deeper": yoco,
    "parscale": transformer,
}
"""By architecture name, the function that makes its stages from the layer count and, if the name is in `LOOPED`, from
`loops` and `loop_gate`."""

LOOPED = frozenset({"yoco_u", "universal_transformer", "rins", "upper_loop", "upper_loop_without_shared_kv"})

DEPTH_FACTOR = {"deep": 1.5, "deeper": 2.0}

SIZES: dict[str, dict[str, Any]] = {
    "test": {
        "layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "window": 8, "vocab_size": 96,
    },
    "quickstart": {
        "layers": 6, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "window": 64, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "8m": {
        "layers": 8, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "window": 128, "vocab_size": 8192, "tie_word_embeddings": True,
    },
    "100m": {
        "layers": 8, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "window": 512, "vocab_size": 16384, "tie_word_embeddings": True,
    },
    "1.3b": {
        "layers": 20, "hidden_size": 2560, "intermediate_size": 4864, "num_attention_heads": 20, "num_key_value_heads": 4,
        "head_dim": 128, "window": 512, "vocab_size": 100352, "tie_word_embeddings": True,
    },
    "10b-moe": {
        "layers": 20, "hidden_size": 2560, "intermediate_size": 4864, "num_attention_heads": 20, "num_key_value_heads": 4,
        "head_dim": 128, "window": 512, "vocab_size": 100352, "tie_word_embeddings": True,
        "experts": {"intermediate_size": 960},
    },
}  # fmt: skip
"""Shapes by size. `1.3b` and `10b-moe` are the paper's models. Their layers, hidden size, window, experts and KV width are from
the paper; their feed-forward widths and vocabulary, which it does not give, are chosen to meet its parameter counts. A token of
`10b-moe` meets 1.3B parameters in the experts, and 1.9B with attention and embedding."""


def preset(name: str, /, size: str = "8m", **settings: Any) -> Architecture:
    """An architecture of the paper at a named size.

    Args:
        name: one of `STAGES`.
        size: one of `SIZES`.
        settings: `layers`; `loops` and `loop_gate` for a looped architecture; `streams` and `prefix_tokens` for `parscale`; and
            any field of `Architecture`. They replace the size's own values.

    Raises:
        UserError: for an unknown name or size, or settings that make an impossible architecture.
    """
    for value, known, what in ((name, STAGES, "preset"), (size, SIZES, "size")):
        if not isinstance(value, str) or value not in known:
            raise UserError(f"unknown {what} {shown(value)}: {did_you_mean(str(value), known)}")
    keys = [*Architecture.model_fields, "layers", "loops", "loop_gate", "streams", "prefix_tokens"]
    for key in settings.keys() - keys:
        raise UserError(f"preset {name}: unknown key {key}: {did_you_mean(key, keys)}")
    shape = SIZES[size] | settings
    if name in DEPTH_FACTOR:
        shape = _deepened(SIZES[size], DEPTH_FACTOR[name]) | settings
    layers = shape.pop("layers")
    if not isinstance(layers, int) or not 2 <= layers < 2**31 or layers % 2:
        raise UserError(f"layers is {shown(layers)}; expected an even number of at least 2, as presets split it in two halves")
    looping: dict[str, Any] = {key: shape.pop(key) for key in ("loops", "loop_gate") if key in shape}
    if looping and name not in LOOPED:
        raise UserError(f"{name} has no loop, so {' and '.join(looping)} cannot be set; looped are {', '.join(sorted(LOOPED))}")
    if looping and "stages" in settings:
        raise UserError(f"{' and '.join(looping)} cannot be set beside stages, which say it themselves; drop one of the two")
    if shape.get("experts") is not None and "intermediate_size" in settings:
        raise UserError(
            "intermediate_size is the width without experts, but experts are set; set experts.intermediate_size instead"
        )
    if name == "parscale" and (both := {"streams", "prefix_tokens"} & settings.keys()) and "parallel" in settings:
        raise UserError(
            f"{' and '.join(sorted(both))} cannot be set beside parallel, which says it itself; drop one of the two"
        )
    if name == "parscale":
        streams = {key: shape.pop(key) for key in ("streams", "prefix_tokens") if key in shape}
        shape.setdefault("parallel", {"streams": 2} | streams)
    try:
        stages = STAGES[name](layers, **looping)
    except ValidationError as error:
        raise UserError(describe(Stage, error)) from None
    if all(stage.attention != "sliding" for stage in stages) and "window" not in settings:
        shape.pop("window", None)
    return parse(Architecture, {"stages": [stage.model_dump() for stage in stages]} | shape, f"preset {name}")


def _deepened(shape: dict[str, Any], factor: float) -> dict[str, Any]:
    """About the same parameters at `factor` times the depth, in whole heads; `1.3b` at 2 is the paper's 40 layers of 1792."""
    narrower = factor**-0.5
    heads = max(1, round(shape["num_attention_heads"] * narrower))
    experts = shape.get("experts")
    return shape | {
        "layers": 2 * round(shape["layers"] * factor / 2),
        "hidden_size": shape["hidden_size"] // shape["num_attention_heads"] * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": gcd(heads, shape["num_key_value_heads"]),
        "intermediate_size": _narrowed(shape["intermediate_size"], narrower),
        **({"experts": experts | {"intermediate_size": _narrowed(experts["intermediate_size"], narrower)}} if experts else {}),
    }


def _narrowed(width: int, factor: float) -> int:
    return 16 * round(width * factor / 16)
