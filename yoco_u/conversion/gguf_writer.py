"""GGUF files, which llama.cpp reads: our Transformer as the Llama, Qwen2 or Qwen3 that it is.

llama.cpp has code for these families, and none for stages that loop or share keys and values, so nothing else can be written.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.conversion.families import config_of, tensor_names
from yoco_u.conversion.gguf_reader import FACTORS, gguf_names, rope_factors, yarn_attention
from yoco_u.conversion.gguf_tokenizer import write_tokenizer
from yoco_u.conversion.source import Source, in_dtype
from yoco_u.errors import UserError
from yoco_u.files import GENERATOR, check_result, replacing
from yoco_u.loading import check_loops

if TYPE_CHECKING:
    import gguf

GENERATOR_KEY = "yoco_u.generator"
_CONTEXT = 4096  # tokens that llama.cpp allots at first, where nothing says how many the model was made for
_YARN = (1.0, 32.0, True)  # low_turns, high_turns and truncate: what llama.cpp takes for granted


def write_gguf(source: Source, path: Path) -> str:
    """Write a Transformer of ours as a GGUF file, with its tokenizer and chat template; it appears whole or not at all.

    Matrices are written in the source's dtype, and vectors in float32, as llama.cpp wants them.

    Returns:
        llama.cpp's name of the family.

    Raises:
        UserError: if llama.cpp cannot express the model or its tokenizer; it says why.
    """
    import gguf

    a = source.model.model.architecture
    check_loops(source.name, a, source.model.config.num_loops)
    family = _family(a, source.name)
    check_result(path)
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file, family)
        writer.add_string(GENERATOR_KEY, GENERATOR)
        _write_settings(writer, a, source)
        write_tokenizer(writer, source.tokenizer, a.vocab_size, source.name)
        names = gguf_names(a, family)
        weights = source.model.state_dict()
        for theirs, ours in tensor_names(a):
            name, tensor = names[theirs], weights[ours]
            if family == "llama" and ".attn_q." in name:
                tensor = _interleaved(tensor, a.num_attention_heads)
            elif family == "llama" and ".attn_k." in name:
                tensor = _interleaved(tensor, a.num_key_value_heads)
            _add(writer, name, tensor, source.dtype)
        if a.rotary_scaling is not None and a.rotary_scaling.type == "llama3":
            _add(writer, FACTORS, rope_factors(a.head_dim, a.rope_theta, a.rotary_scaling), torch.float32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return family


def _family(a: Architecture, name: str) -> str:
    """llama.cpp's name of the family whose blocks the model has.

    Raises:
        UserError: if there is none.
    """
    try:
        kind = str(config_of(a)["model_type"])
    except UserError as error:
        raise UserError(
            f"{name}: {str(error).split(',')[0]}, for which llama.cpp has no code; it runs our transformer alone"
        ) from None
    if kind == "mistral":
        raise UserError(f"{name}: the model has a window, for which llama.cpp's Llama has no code")
    scaling = a.rotary_scaling
    if scaling is not None and scaling.type == "yarn" and (scaling.low_turns, scaling.high_turns, scaling.truncate) != _YARN:
        raise UserError(f"{name}: the model's YaRN has settings of its own (turns, truncate), for which llama.cpp has no code")
    if scaling is not None and scaling.type == "llama3" and kind != "llama":
        raise UserError(f"{name}: the model has Llama 3's RoPE scaling in a {kind}, for which llama.cpp has no code")
    return kind


def _write_settings(writer: "gguf.GGUFWriter", a: Architecture, source: Source) -> None:
    import gguf

    writer.add_name(Path(source.name).stem)
    writer.add_file_type(gguf.LlamaFileType[_KINDS[source.dtype][1]])
    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(source.model.config.max_position_embeddings or _CONTEXT)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.stages[0].layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_key_value_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(a.rms_norm_eps)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope_theta)
    scaling = a.rotary_scaling
    if scaling is None:
        return
    if scaling.original_length is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_length)
    if scaling.type == "llama3":  # by its factors, see `write_gguf`
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == "yarn":
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / yarn_attention(scaling.factor))


_KINDS = {torch.float32: ("F32", "ALL_F32"), torch.float16: ("F16", "MOSTLY_F16"), torch.bfloat16: ("BF16", "MOSTLY_BF16")}
"""By the dtype of matrices, gguf's names of a tensor's type and of a file's."""


def _add(writer: "gguf.GGUFWriter", name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    import gguf

    in_dtype(name, tensor, dtype)
    kind = gguf.GGMLQuantizationType[_KINDS[dtype if tensor.ndim > 1 else torch.float32][0]]
    writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head in the order in which llama.cpp's Llama rotates: pairs beside each other, not half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
