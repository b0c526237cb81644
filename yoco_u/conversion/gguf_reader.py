"""What a GGUF file says and transformers does not read: which tensors it has, how RoPE is scaled, how texts begin, and more."""

import importlib.util
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yoco_u.architecture import Architecture, RotaryScaling
from yoco_u.conversion.families import tensor_names
from yoco_u.errors import UserError
from yoco_u.model.rope import frequency_scale, rotary_frequencies

FACTORS = "rope_freqs.weight"
"""The tensor of a GGUF file that holds `rope_factors`."""

_INSTEAD = "convert the folder with safetensors instead"


def check_gguf(path: Path) -> None:
    """Raise a UserError unless the packages are installed that read and write such files."""
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{path}: GGUF files need the {name} package: pip install 'yoco-u[conversion]'")


class Unread(NamedTuple):
    """What a GGUF file says and transformers does not read, see `unread_settings`.

    Attributes:
        config: fields of a config: the scaling of RoPE, and the size of heads.
        tokenizer: `tokenizer.ggml.model`.
        pre: `tokenizer.ggml.pre`.
        begins: whether texts begin with the bos token, which transformers reads from 5.23 on; None if the file does not say.
        tokens: how many tokens the vocabulary has.
        templates: chat templates besides the default one, by their names.
        tensors: names of the tensors in the file.
        dtype: of all matrices; float32 if they are quantized, or not all of one dtype.
    """

    config: dict[str, Any]
    tokenizer: str | None
    pre: str | None
    begins: bool | None
    tokens: int
    templates: dict[str, str]
    tensors: frozenset[str]
    dtype: torch.dtype


def unread_settings(path: Path) -> Unread:
    """Read what transformers leaves unread in a GGUF file.

    Raises:
        UserError: if RoPE is scaled in a way that cannot be known from the file, or if a setting of the model is one that our
            blocks lack.
    """
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return None if (field := reader.get_field(key)) is None else field.contents()

    family = value("general.architecture")
    head_dim = value(f"{family}.attention.key_length")
    head_dim = head_dim or value(f"{family}.embedding_length") // value(f"{family}.attention.head_count")
    settings = {key.removeprefix(f"{family}."): value(key) for key in reader.fields if key.startswith(f"{family}.")}
    of_rope = {key.removeprefix("rope."): settings.pop(key) for key in [*settings] if key.startswith("rope.")}
    _check_settings(settings, _model_settings(head_dim), _MODEL, f"{path}: {family}.")
    factors = next((torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == FACTORS), None)
    rope = _rope(of_rope, head_dim, settings.get("context_length", 0), factors, f"{path}: {family}.rope.")
    tokens = reader.get_field(gguf.Keys.Tokenizer.LIST)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return Unread(
        config={"head_dim": head_dim} | ({"rope_parameters": rope} if rope else {}),
        tokenizer=value(gguf.Keys.Tokenizer.MODEL),
        pre=value(gguf.Keys.Tokenizer.PRE),
        begins=value(gguf.Keys.Tokenizer.ADD_BOS),
        tokens=0 if tokens is None else len(tokens.data),
        templates={
            name: value(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name))
            for name in value(gguf.Keys.Tokenizer.CHAT_TEMPLATES) or ()
        },
        tensors=frozenset(tensor.name for tensor in reader.tensors),
        dtype={("F16",): torch.float16, ("BF16",): torch.bfloat16}.get(tuple(kinds), torch.float32),
    )


def gguf_names(a: Architecture, family: str) -> dict[str, str]:
    """The name in a GGUF file of each of a family's tensors, by the name in its checkpoints (see `tensor_names`).

    Args:
        family: its `model_type`; llama.cpp has a Mistral as a Llama.
    """
    import gguf

    kind = gguf.MODEL_ARCH["LLAMA" if family == "mistral" else family.upper()]
    names = gguf.get_tensor_name_map(kind, a.stages[0].layers)
    return {theirs: names.get_name(theirs, try_suffixes=(".weight", ".bias")) for theirs, _ in tensor_names(a)}


def check_tensors(a: Architecture, family: str, found: frozenset[str], path: Path) -> None:
    """Refuse a file that lacks a tensor, in whose place transformers puts random numbers, or has one that would be lost.

    Raises:
        UserError: if there is one; it names the tensor.
    """
    expected = set(gguf_names(a, family).values())
    for name in sorted(expected - found):
        raise UserError(f"{path}: the tensor {name} is missing; the file is incomplete, a part of a model or of another family")
    if lost := sorted(found - expected - {FACTORS}):
        raise UserError(f"{path}: the tensor {lost[0]} is none of its family; {len(lost)} tensors would be lost")


_MODEL = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "pooling_type", *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "layer_norm_rms_epsilon")),
})  # fmt: skip
"""Settings of a model that are read, or say nothing about what is computed."""


def _model_settings(head_dim: int) -> dict[str, float]:
    """Settings of a model that change what is computed, with the one value that our blocks have for each."""
    return {
        "attention.scale": head_dim**-0.5, "attention.value_length": head_dim, "attention.causal": True,
        "attention.sliding_window": 0, "attn_logit_softcapping": 0, "final_logit_softcapping": 0,
        "embedding_scale": 1, "residual_scale": 1, "logit_scale": 1, "expert_count": 0, "expert_used_count": 0,
    }  # fmt: skip


def _check_settings(settings: dict[str, Any], only: dict[str, float], known: Collection[str], place: str) -> None:
    """Refuse what cannot be read, by name.

    Args:
        settings: of a file, by their names.
        only: settings of which a single value can be read.
        known: other settings that are known.
        place: what errors begin with.
    """
    for name, found in settings.items():
        if name in only and not (isinstance(found, (int, float)) and math.isclose(found, only[name], rel_tol=1e-6)):
            given = f"{found:g}" if isinstance(found, float) else found
            raise UserError(f"{place}{name} is {given}, but only {only[name]:g} can be read; {_INSTEAD}")
        if name not in only and name not in known:
            raise UserError(f"{place}{name} is {found}, a setting that is not known; {_INSTEAD}")


_ROPE = frozenset({
    "freq_base", "scale_linear",
    *(f"scaling.{name}" for name in ("type", "factor", "original_context_length", "attn_factor", "finetuned")),
    "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
})  # fmt: skip
"""Settings of RoPE that are read, or say nothing about what is computed."""


def _rope(settings: dict[str, Any], head_dim: int, context: int, factors: Tensor | None, place: str) -> dict[str, Any]:
    """The `rope_parameters` of a config, if RoPE is scaled.

    llama.cpp itself reads no `yarn_` setting of these families; its converter writes them as the model's makers gave them.
    `yarn_attn_factor` is an exception, since it writes two settings under this name: what attention is scaled by, and what
    comes on top of YaRN's own scale.

    Args:
        settings: of the file, by their names after `rope.`.
        context: tokens that the model was made for.
        factors: `rope_factors`, if the file has them.
        place: what errors begin with.
    """
    factor = settings.get("scaling.factor", settings.get("scale_linear")) or 1.0
    kind = settings.get("scaling.type") or ("none" if factor == 1 else "linear")
    only: dict[str, float] = {"dimension_count": head_dim, "scaling.yarn_ext_factor": 1.0}
    if kind == "yarn":
        only["scaling.yarn_attn_factor"] = yarn_attention(factor)
    else:
        only["scaling.attn_factor"] = 1.0
    if factors is not None:
        only["scaling.factor"] = only["scale_linear"] = 1.0
    _check_settings(settings, only, _ROPE, place)
    rope = {"rope_theta": settings["freq_base"]} if "freq_base" in settings else {}
    original = settings.get("scaling.original_context_length")
    if factors is not None:
        return rope | _llama3_of(factors, head_dim, rope.get("rope_theta", 10000.0), original or 8192, place)
    if kind == "none":
        return {}
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        turns = {f"beta_{name}": settings.get(f"scaling.yarn_beta_{name}") for name in ("fast", "slow")}
        attention = yarn_attention(factor) * settings.get("scaling.attn_factor", 1.0)
        rope |= {"original_max_position_embeddings": original or context, "attention_factor": attention} | turns
    return rope


def rope_factors(head_dim: int, theta: float, scaling: RotaryScaling) -> Tensor:
    """What llama.cpp divides the frequencies by, (head_dim / 2,)."""
    return 1 / frequency_scale(rotary_frequencies(head_dim, theta), theta, scaling)


def yarn_attention(factor: float) -> float:
    """What llama.cpp scales attention by for YaRN (arXiv 2309.00071, equation 22); a file holds what comes on top."""
    return 0.1 * math.log(factor) + 1


def _llama3_of(factors: Tensor, head_dim: int, theta: float, original: int, place: str) -> dict[str, Any]:
    """The settings of Llama 3's scaling that give these factors, of which the file says no more."""
    scaling = RotaryScaling(type="llama3", factor=float(factors.max()), original_length=original)
    expected = rope_factors(head_dim, theta, scaling)
    if factors.shape != expected.shape or not torch.allclose(factors.float(), expected, rtol=1e-4):
        raise UserError(f"{place}RoPE is scaled by factors that are not Llama 3's; {_INSTEAD}")
    return {
        "rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": original,
        "low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns,
    }  # fmt: skip
