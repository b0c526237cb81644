"""Reading a checkpoint of another family, as a model of ours that computes the same: our Transformer."""

from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from yoco_u.checksums import SUMS, verify_checksums
from yoco_u.conversion.families import architecture_of, check_family, tensor_names
from yoco_u.conversion.gguf_reader import check_gguf, check_tensors, unread_settings
from yoco_u.conversion.gguf_tokenizer import begins_texts, restored
from yoco_u.data import begin_with, begin_with_end_of_text, load_tokenizer, vocabulary_size
from yoco_u.errors import UserError, first_line
from yoco_u.files import read_json
from yoco_u.loading import check_adapters, is_run, load_model, model_folder
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.model.saving import FLOATS, FLOATS_OF_EIGHT_BITS, check_depth, check_dtypes, quiet_transformers, weight_files
from yoco_u.regular_files import check_regular_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights are written in, by the names in config.json."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    Attributes:
        name: what it is called in messages.
        model: a model of ours, in evaluation mode, in float32 on the CPU.
        tokenizer: as it came, with its chat template.
        dtype: of the weights in the checkpoint, if it is one of `DTYPES`, otherwise float32.
        generation: how the checkpoint's makers would sample from it; None if they do not say.
        ours: its folder if it is a model of this project, whatever its architecture.
    """

    name: str
    model: YocoUForCausalLM
    tokenizer: PreTrainedTokenizerFast
    dtype: torch.dtype
    generation: GenerationConfig | None
    ours: Path | None = None


def read_source(path: str) -> Source:
    """Read a checkpoint.

    Args:
        path: a folder with safetensors, a GGUF file, a model or run of this project, or a name on the Hugging Face hub.

    Raises:
        UserError: if it cannot be read: an unknown family, a tensor or file that is missing, damaged or of another shape. The
            message names file and tensor.
    """
    place = Path(path)
    if place.is_file():
        return _read_gguf(place)
    if not place.exists():
        place = _download(path)
    check_regular_files(place)
    if _is_ours(place):
        return _read_ours(place)
    check_adapters(place)
    if (place / SUMS).exists():
        verify_checksums(place, "copy it again")
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything on a damaged file
        raise UserError(f"{place}: cannot read the config ({first_line(error)}); give a folder with config.json") from None
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise UserError(
            f"{place / 'config.json'}: the weights are quantized ({method or 'quantization_config'}), and their scales would "
            "be lost; give the checkpoint that they were made from, or a GGUF file"
        )
    weights = _read_safetensors(place)
    return _assemble(path, config, weights, load_tokenizer(place, keep_start=True), _generation(place))


def _is_ours(place: Path) -> bool:
    try:
        return read_json(model_folder(place) / "config.json", dict[str, Any]).get("model_type") == "yoco_u"
    except UserError:
        if is_run(place):
            raise
        return False


def _read_ours(place: Path) -> Source:
    model, tokenizer = load_model(place, torch.device("cpu"))
    folder = model_folder(place)
    stored = str(read_json(folder / "config.json", dict[str, Any]).get("dtype"))
    return Source(str(place), model, tokenizer, DTYPES.get(stored, torch.float32), _generation(folder), folder)


def _download(name: str) -> Path:
    if name.count("/") != 1:
        raise UserError(f"{name}: no such folder or file; give a checkpoint's folder, a GGUF file or a name on the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]))
    except Exception as error:  # whatever the network does
        raise UserError(f"{name}: no such folder, and not to be had from the Hugging Face hub ({first_line(error)})") from None


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                check_dtypes(file, opened, (*FLOATS, *FLOATS_OF_EIGHT_BITS))
                weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(
                f"{file}: the file is missing; only safetensors are read, since other weights can run programs; "
                "copy the checkpoint again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged ({first_line(error)}); copy the checkpoint again") from None
    return weights


def _read_gguf(file: Path) -> Source:
    check_gguf(file)
    check_adapters(file.parent)
    try:
        arguments = {"gguf_file": file.name, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(file.parent, **arguments)
        check_family(config, str(file))
        unread = unread_settings(file)
        for name, value in unread.config.items():
            setattr(config, name, value)
        architecture = architecture_of(config, str(file))
        check_depth(architecture, len(unread.tensors), file)
        check_tensors(architecture, config.model_type, unread.tensors, file)
        begins = begins_texts(unread)
        tokenizer = load_tokenizer(file.parent, keep_start=begins, gguf_file=file.name)
        if begins and tokenizer.bos_token is not None:
            begin_with(tokenizer, tokenizer.bos_token)
        tokenizer = restored(tokenizer, unread, str(file))
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused here
        with quiet_transformers(), redirect_stderr(StringIO()):  # where a bar would be drawn
            model, loaded = AutoModelForCausalLM.from_pretrained(file.parent, config=config, dtype=torch.float32, **arguments)
        for name, *shapes in loaded["mismatched_keys"]:
            raise _of_another_shape(str(file), name, *shapes)
    except UserError:
        raise
    except Exception as error:  # the parsers raise nearly anything on a damaged file
        raise UserError(
            f"{file}: cannot be read as GGUF ({first_line(error)}); it is damaged, or of a family unknown to transformers"
        ) from None
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in loaded["missing_keys"]}
    source = _assemble(str(file), config, weights, tokenizer, model.generation_config)
    return replace(source, dtype=unread.dtype)


def _assemble(
    name: str,
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    generation: GenerationConfig | None,
) -> Source:
    architecture = architecture_of(config, name)
    check_depth(architecture, len(weights), name)
    if architecture.tie_word_embeddings and _has_own_head(weights):
        architecture = architecture.model_copy(update={"tie_word_embeddings": False})
    begin_with_end_of_text(tokenizer)
    if (needed := vocabulary_size(tokenizer)) > architecture.vocab_size:
        raise UserError(f"{name}: the tokenizer has ids up to {needed - 1}, but the vocabulary has {architecture.vocab_size}")
    ids = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ours = YocoUConfig.from_architecture(
        architecture, max_position_embeddings=getattr(config, "max_position_embeddings", None), **ids
    )
    with torch.device("meta"):
        model = YocoUForCausalLM(ours)
    expected, found = model.state_dict(), {}
    for theirs, mine in tensor_names(architecture):
        if theirs not in weights:
            raise UserError(f"{name}: the tensor {theirs} is missing; the checkpoint is incomplete or of another family")
        tensor, shape = weights[theirs].float(), expected[mine].shape
        if tensor.shape != shape:
            raise _of_another_shape(name, theirs, tensor.shape, shape)
        if not tensor.isfinite().all():
            raise UserError(f"{name}: the tensor {theirs} has values that are not finite; the checkpoint is damaged")
        found[mine] = tensor
    unknown = weights.keys() - {theirs for theirs, _ in tensor_names(architecture)} - {"lm_head.weight"}
    if left := sorted(name for name in unknown if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"{name}: the tensor {left[0]} is none of its family; {len(left)} tensors would be lost")
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    dtype = weights["model.embed_tokens.weight"].dtype
    return Source(name, model.eval(), tokenizer, dtype if dtype in DTYPES.values() else torch.float32, generation)


def _of_another_shape(name: str, tensor: str, found: torch.Size, expected: torch.Size) -> UserError:
    return UserError(f"{name}: the tensor {tensor} has shape {tuple(found)}; the config says {tuple(expected)}")


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype in which it is written.

    Raises:
        UserError: if that makes a value infinite or none; it names the tensor.
    """
    found = tensor.to(dtype)
    if not found.isfinite().all():
        raise UserError(f"the tensor {name} has values that are not finite in {dtype}; write another --dtype")
    return found


def _has_own_head(weights: dict[str, Tensor]) -> bool:
    """Whether an LM head is there that is not the embedding; transformers goes by this, and not by the config alone."""
    head, embedding = (weights.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    return head is not None and embedding is not None and not torch.equal(head, embedding)


def _generation(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder / 'generation_config.json'}: damaged ({first_line(error)}); remove it to go on") from None
