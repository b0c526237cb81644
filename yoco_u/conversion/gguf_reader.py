"""What a GGUF file says and transformers does not read: how RoPE is scaled, the size of heads, how texts begin."""

import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yoco_u.architecture import RotaryScaling
from yoco_u.errors import UserError
from yoco_u.model.rope import frequency_scale, rotary_frequencies

FACTORS = "rope_freqs.weight"
"""The tensor of a GGUF file that holds `rope_factors`."""


def check_gguf(path: Path) -> None:
    """Raise a UserError unless the packages are installed that read and write such files."""
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{path}: GGUF files need the {name} package: pip install 'yoco-u[conversion]'")


class Unread(NamedTuple):
    """What a GGUF file says and transformers does not read, see `unread_settings`.

    Attributes:
        config: fields of a config: the scaling of RoPE, and the size of heads.
        pre: `tokenizer.ggml.pre`.
        begins: whether texts begin with the bos token, which transformers reads from 5.23 on; None if the file does not say.
        tokens: how many tokens the vocabulary has.
        tensors: how many tensors the file has.
    """

    config: dict[str, Any]
    pre: str | None
    begins: bool | None
    tokens: int
    tensors: int


def unread_settings(path: Path) -> Unread:
    """Read what transformers leaves unread in a GGUF file.

    Raises:
        UserError: if RoPE is scaled in a way that cannot be known from the file.
    """
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return None if (field := reader.get_field(key)) is None else field.contents()

    family = value("general.architecture")
    found: dict[str, Any] = {}
    if (head_dim := value(f"{family}.attention.key_length")) is not None:
        found["head_dim"] = head_dim
    settings = {
        name: value(f"{family}.rope.{key}")
        for name, key in {
            "rope_theta": "freq_base", "rope_type": "scaling.type", "factor": "scaling.factor",
            "original_max_position_embeddings": "scaling.original_context_length",
        }.items()
    }  # fmt: skip
    rope = {name: one for name, one in settings.items() if one is not None}
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == FACTORS), None)
    if factors is not None:
        rope |= _llama3_of(torch.tensor(factors), rope, path)
    elif rope.get("rope_type") == "yarn":
        rope["attention_factor"] = yarn_attention(rope["factor"]) * (value(f"{family}.rope.scaling.attn_factor") or 1.0)
    if rope.get("rope_type") not in (None, "none"):
        found["rope_parameters"] = rope
    tokens = reader.get_field("tokenizer.ggml.tokens")
    count = 0 if tokens is None else len(tokens.data)
    return Unread(found, value("tokenizer.ggml.pre"), value("tokenizer.ggml.add_bos_token"), count, len(reader.tensors))


def rope_factors(head_dim: int, theta: float, scaling: RotaryScaling) -> Tensor:
    """What llama.cpp divides the frequencies by, (head_dim / 2,)."""
    return 1 / frequency_scale(rotary_frequencies(head_dim, theta), theta, scaling)


def yarn_attention(factor: float) -> float:
    """What llama.cpp scales attention by for YaRN (arXiv 2309.00071, equation 22); a file holds what comes on top."""
    return 0.1 * math.log(factor) + 1


def _llama3_of(factors: Tensor, rope: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of Llama 3's scaling that give these factors, of which the file says no more."""
    original = rope.get("original_max_position_embeddings", 8192)
    scaling = RotaryScaling(type="llama3", factor=float(factors.max()), original_length=original)
    expected = rope_factors(2 * len(factors), rope.get("rope_theta", 10000.0), scaling)
    if not torch.allclose(factors.float(), expected, rtol=1e-4):
        raise UserError(
            f"{path}: RoPE is scaled by factors that are not Llama 3's; convert the folder with safetensors instead"
        )
    return {
        "rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": original,
        "low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns,
    }  # fmt: skip
