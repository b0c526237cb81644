"""The families of checkpoints that can be read: how their configs and tensor names say what ours say.

All of them are Llama (arXiv 2302.13971) with a few differences: Mistral's window, the biases of Qwen2, the QK norms of Qwen3.
SmolLM, SmolLM2 and many others are Llamas by their own config.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from yoco_u.architecture import Architecture
from yoco_u.config import did_you_mean, parse
from yoco_u.errors import UserError, first_line

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type` of the configs that can be read."""

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    **{f"self_attn.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"},
    **{f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
_BIASES = {f"self_attn.{name}_proj.bias": f"attn.{name}_bias" for name in "qkv"}
_QK_NORMS = {f"self_attn.{name}_norm.weight": f"attn.{name}_norm.weight" for name in "qk"}


def tensor_names(a: Architecture) -> Iterator[tuple[str, str]]:
    """The name of each tensor in a family's checkpoint and in ours, for a model of one stage without loops."""
    yield "model.embed_tokens.weight", "model.embed_tokens.weight"
    of_layer = _LAYER | (_BIASES if a.attention_bias else {}) | (_QK_NORMS if a.qk_norm else {})
    for layer in range(a.stages[0].layers):
        for theirs, ours in of_layer.items():
            yield f"model.layers.{layer}.{theirs}", f"model.stages.0.layers.{layer}.{ours}"
    yield "model.norm.weight", "model.norm.weight"
    if not a.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"


def check_family(config: PreTrainedConfig, name: str) -> None:
    """Raise a UserError, which begins with `name`, unless the config is of a family that can be read."""
    if (kind := config.model_type) not in FAMILIES:
        raise UserError(f"{name}: the model_type is {kind!r}: {did_you_mean(str(kind), FAMILIES)}")


def architecture_of(config: PreTrainedConfig, name: str) -> Architecture:
    """The architecture of a checkpoint: one stage, full or, for a Mistral with a window, sliding.

    Args:
        config: of transformers.
        name: what the error calls the checkpoint.

    Raises:
        UserError: if the family is unknown, or the config has what our blocks lack; it is named.
    """
    check_family(config, name)
    kind = config.model_type
    for lacking in _lacking(config):
        raise UserError(f"{name}: the config has {lacking}, which this project's blocks lack")
    window = _window(config, name)
    heads = config.num_attention_heads
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "stages": [{"attention": "full" if window is None else "sliding", "layers": config.num_hidden_layers}],
        "window": window,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "attention_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        **_readable_rope(config, name),
    }
    return parse(Architecture, shape, name)


def config_of(a: Architecture, **kept: Any) -> dict[str, Any]:
    """The fields of a family's config for a model of ours: the way back. `model_type` says which family it is.

    Args:
        kept: fields that are the same in both, such as the ids of special tokens.

    Raises:
        UserError: if no family can express the architecture; the message says why.
    """
    stage = a.stages[0]
    for present, what in (
        (len(a.stages) > 1, "more than one stage"),
        (stage.loops > 1, "a loop"),
        (stage.attention not in ("full", "sliding"), f"{stage.attention} attention"),
        (a.experts is not None, "a mixture of experts"),
        (a.parallel is not None, "parallel streams"),
        (a.attention_bias and a.qk_norm, "both biases and QK norms"),
        (stage.attention == "sliding" and (a.attention_bias or a.qk_norm), "a window beside biases or QK norms"),
    ):
        if present:
            raise UserError(
                f"the model has {what}, which no Llama, Mistral or Qwen has; only the transformer can be written back"
            )
    kind = "qwen2" if a.attention_bias else "qwen3" if a.qk_norm else "mistral" if stage.attention == "sliding" else "llama"
    return {
        "model_type": kind,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": stage.layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        "rms_norm_eps": a.rms_norm_eps,
        "tie_word_embeddings": a.tie_word_embeddings,
        "rope_parameters": _rope_parameters(a),
        **({"sliding_window": a.window} if kind == "mistral" else {}),
        **kept,
    }


def _lacking(config: PreTrainedConfig) -> Iterator[str]:
    """What the config has that our blocks lack, in its own words."""
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act!r}"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            yield f"{name} (biases of the output projection or of the feed-forward)"


def _window(config: PreTrainedConfig, name: str) -> int | None:
    if config.model_type == "llama":  # whose attention is full, whatever a config that was made of another's says
        return None
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (["full_attention"] if window is None else ["sliding_attention"]))
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return int(window)
    raise UserError(f"{name}: the config mixes layers of {' and '.join(sorted(kinds))}, which one stage cannot")


def _readable_rope(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    try:
        return _rope(config, name)
    except UserError:
        raise
    except Exception as error:  # transformers checks few of these settings, and warns of what it finds
        raise UserError(f"{name}: the config's RoPE settings make no sense ({first_line(error)}); mend them") from None


def _rope(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    config.standardize_rope_params()  # takes a length from outside of the parameters, as the model does
    given: dict[str, Any] = dict(config.rope_parameters)
    theta, kind = given.get("rope_theta", 10000.0), given.get("rope_type", "default")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{name}: the config rotates a part of each head, which this project's blocks do not")
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"type": kind, "factor": given["factor"]}
    elif kind == "llama3":
        scaling = {
            "type": kind, "factor": given["factor"], "original_length": given["original_max_position_embeddings"],
            "low_turns": given["low_freq_factor"], "high_turns": given["high_freq_factor"],
        }  # fmt: skip
    elif kind == "yarn":
        scaling = {
            "type": kind, "factor": given["factor"], "original_length": given["original_max_position_embeddings"],
            "low_turns": given.get("beta_slow") or 1, "high_turns": given.get("beta_fast") or 32,
            "truncate": given.get("truncate", True), "attention_factor": _attention_factor(config),
        }  # fmt: skip
    elif kind != "default":
        raise UserError(f"{name}: the config has RoPE scaling {kind!r}; known are linear, llama3 and yarn")
    return {"rope_theta": theta, "rotary_scaling": scaling}


def _attention_factor(config: PreTrainedConfig) -> float:
    """As transformers computes it, from one of several sets of settings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return float(ROPE_INIT_FUNCTIONS["yarn"](config)[1])


def _rope_parameters(a: Architecture) -> dict[str, Any]:
    basic = {"rope_theta": a.rope_theta, "rope_type": "default"}
    scaling = a.rotary_scaling
    if scaling is None:
        return basic
    basic |= {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "linear":
        return basic
    basic |= {"original_max_position_embeddings": scaling.original_length}
    if scaling.type == "llama3":
        return basic | {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
    return basic | {
        "attention_factor": scaling.attention_factor, "truncate": scaling.truncate,
        "beta_slow": scaling.low_turns, "beta_fast": scaling.high_turns,
    }  # fmt: skip
