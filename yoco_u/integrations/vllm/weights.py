"""From the tensor names of our checkpoints (docs/checkpoint-format.md) to those of the model in vLLM."""

import re

from vllm.model_executor.models.utils import WeightsMapper

from yoco_u.architecture import Architecture


def weights_mapper(a: Architecture) -> WeightsMapper:
    """Put each tensor into its part of the model; join q, k and v, and gate and up, into one tensor each."""
    last = "cross_decoder" if a.has_global_kv else "self_decoder"
    parts = {"model.embed_tokens.": "self_decoder.embed_tokens.", "model.global_kv.": "self_decoder.global_kv."}
    parts["model.norm."] = f"{last}.norm."
    stacked: dict[str, tuple[str, str | int]] = {}
    for mlp in (".mlp.", ".mlp.shared."):
        stacked |= {f"{mlp}{name}_proj.": (f"{mlp}gate_up_proj.", shard) for shard, name in enumerate(("gate", "up"))}
    for number, stage in enumerate(a.stages):
        part = "cross_decoder" if stage.attention == "cross" else "self_decoder"
        parts[f"model.stages.{number}."] = f"{part}.stages.{number}."
        if stage.attention != "cross":
            for layer in range(stage.layers):
                attn = f".stages.{number}.layers.{layer}.attn."
                stacked |= {f"{attn}{name}_proj.": (f"{attn}qkv_proj.", name) for name in "qkv"}
                stacked |= {f"{attn}{name}_bias": (f"{attn}qkv_proj.bias", name) for name in "qkv"}
    cross = "|".join(str(number) for number, stage in enumerate(a.stages) if stage.attention == "cross")
    cross_biases = {re.compile(rf"(\.stages\.(?:{cross})\.layers\.\d+\.attn)\.q_bias$"): r"\1.q_proj.bias"} if cross else {}
    return WeightsMapper(
        # The experts' tensors have no `.weight` at the end; those of a SwiGLU do.
        orig_to_new_regex={re.compile(r"\.mlp\.(gate_up_proj|down_proj)$"): r".mlp.experts.\1"} | cross_biases,
        orig_to_new_stacked=stacked,
        orig_to_new_prefix=parts,
    )
