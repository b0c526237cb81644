"""A model's Hugging Face folder: saved with the tokenizer beside the weights, and checked before it is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from yoco_u.architecture import Architecture
from yoco_u.checksums import keep_changes, verify_checksums, write_checksums
from yoco_u.errors import UserError
from yoco_u.files import DamagedFile, read_json, write_result
from yoco_u.folders import mark, replacing_folder
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.modeling import YocoUForCausalLM

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights, as safetensors names them."""

FLOATS_OF_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    results: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    kind: str | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` read, with checksums. It appears whole or not at all.

    What users have added to an older one in its place, or changed in it, stays: an edited chat template or generation config,
    `exits.json`. Weights, code, `config.json` and `tokenizer.json` are those of the model.

    Args:
        results: JSON files beside the weights, by their names.
        kind: a mark that the folder bears besides, see `yoco_u.folders`.

    Raises:
        UserError: if something that is not ours is there, or weights that were changed on purpose.
        OSError: if it cannot be written.
    """
    with replacing_folder(folder) as beside, quiet_transformers():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for name, data in results.items():
            write_result(beside / name, data)
        weights_and_code = [file for kind in ("*.safetensors", "*.py") for file in beside.glob(kind)]
        write_checksums(beside, [*weights_and_code, beside / "config.json", beside / "tokenizer.json"])
        keep_changes(folder, beside)
        if kind is not None:
            mark(beside, kind)


def lost_model(folder: Path) -> str | None:
    """Why what `save_model` wrote to a folder is not there any more; None if it is, or was changed on purpose.

    Raises:
        OSError: if a file cannot be opened, which says nothing about what is in it.
    """
    if not (folder / "config.json").is_file():
        return f"{folder / 'config.json'} was missing"
    try:
        verify_checksums(folder, "")
    except DamagedFile as error:
        return str(error).removesuffix("; ")
    return None


def check_dtypes(file: Path, opened: Any, known: Sequence[str] = FLOATS) -> None:
    """Refuse a file of weights, opened by safetensors, that holds what is no floating-point numbers, which a cast would hide.

    Raises:
        UserError: if a tensor has another dtype than those that are known; it names file, tensor and dtype.
    """
    for name in opened.keys():  # noqa: SIM118
        if (dtype := opened.get_slice(name).get_dtype()) not in known:
            raise UserError(
                f"{file}: the tensor {name} has dtype {dtype}, expected one of {', '.join(known)}; "
                "give the weights as they were before they were quantized or changed"
            )


class _Index(BaseModel):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder's weights, as transformers chooses them: one, or else those of an index.

    Raises:
        UserError: if the index is damaged, or names what is no file of the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    names = sorted(set(read_json(index, _Index).weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: names {name!r}, which is no file of the folder; copy the checkpoint again")
    return [folder / name for name in names]


def check_weights(folder: Path, config: YocoUConfig) -> None:
    """Compare the names and shapes of a model's tensors with what its config says, before any is loaded.

    transformers would initialise what is missing, leave out what is too much, and tell it in a table.

    Raises:
        UserError: if one is missing, too much, of another shape, or no floating-point numbers; the message names it.
        OSError, SafetensorError: if a file cannot be read.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            check_dtypes(file, opened)
            found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    check_depth(config.architecture, len(found), folder)
    with torch.device("meta"):
        model = YocoUForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    for name in sorted(expected.keys() - found.keys() - tied):
        raise UserError(f"{folder}: the weights lack {name}; the folder is damaged")
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{folder}: the weights have {name}, which has no place in the model of config.json; mend one of them")
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            raise UserError(
                f"{folder}: {name} has shape {found[name]}, but config.json says {expected[name]}; mend one of them"
            )


def check_depth(architecture: Architecture, tensors: int, name: object) -> None:
    """Refuse a config with more layers than there are tensors, before they are made: no weight would be found for most.

    Raises:
        UserError: if there are more; it begins with `name`.
    """
    layers = sum(stage.layers for stage in architecture.stages)
    if layers > tensors:
        raise UserError(f"{name}: the config has {layers:,} layers, but the weights have {tensors:,} tensors; it is damaged")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from showing progress and warnings while it reads or writes a model."""
    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()
