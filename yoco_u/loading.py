"""Finished models read back: a run's or a saved model's weights and tokenizer, with clear errors."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from yoco_u.errors import UserError, first_line
from yoco_u.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from yoco_u.model import YocoUForCausalLM


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether this is a run folder, and not a saved model."""
    return (Path(path) / "config.yaml").is_file()


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The Hugging Face folder of a run, or of a saved model itself.

    Raises:
        UserError: if it is neither, saying what is there.
    """
    folder = Path(path)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a run folder or a saved model")
    if is_run(folder):
        raise UserError(f"{folder}: the run is not finished (model/ is missing); run `yoco-u train` again to finish it")
    raise UserError(f"{folder}: neither a run folder (with model/config.json) nor a saved model (with config.json)")


def model_name(path: str | os.PathLike[str]) -> str:
    """What a folder's model is called: the run's name where the model lies in a run."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name or "model"


def load_model(
    path: str | os.PathLike[str], device: "torch.device", dtype: "torch.dtype | None" = None
) -> tuple["YocoUForCausalLM", "PreTrainedTokenizerFast"]:
    """Model, in evaluation mode and in float32 unless told otherwise, and tokenizer of a run folder or a saved model.

    Raises:
        UserError: if something is missing, damaged or of another kind.
    """
    import torch
    from transformers.utils import logging

    from yoco_u.data import load_tokenizer
    from yoco_u.model import YocoUConfig, YocoUForCausalLM

    folder = model_folder(path)
    kind = read_json(folder / "config.json", {}).get("model_type")
    if kind != "yoco_u":
        raise UserError(f"{folder}: the model_type is {kind!r}, expected 'yoco_u'; give a model of this project")
    logging.disable_progress_bar()
    try:
        config = YocoUConfig.from_pretrained(folder)
        model, info = YocoUForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # safetensors, json and transformers raise nearly anything on damaged files
        raise UserError(f"{folder}: cannot load the model ({first_line(error)}); the folder is damaged") from None
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights lack {min(info['missing_keys'])}; the folder is damaged")
    return model.eval().to(device), load_tokenizer(_tokenizer_folder(folder))


def read_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """The tokenizer of a run folder or a saved model.

    Raises:
        UserError: if it is missing, damaged or of another kind.
    """
    from yoco_u.data import load_tokenizer

    return load_tokenizer(_tokenizer_folder(model_folder(path)))


def _tokenizer_folder(model: Path) -> Path:
    for candidate in (model, model.parent / "tokenizer"):
        if (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(f"{model}: tokenizer.json is missing; copy the tokenizer's files into this folder")
