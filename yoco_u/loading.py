"""Loading finished models: weights and tokenizer of a run folder or a saved model.

Torch and transformers are imported when a model is loaded, so that commands which only look at folders start at once.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoco_u.checksums import SUMS, verify_checksums
from yoco_u.errors import UserError, first_line
from yoco_u.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from yoco_u.model import YocoUForCausalLM


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a run, which has a `config.yaml`, and not a saved model."""
    return (Path(path) / "config.yaml").is_file()


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder with the model's `config.json`: `model/` in a run folder, the folder itself if it is a saved model.

    Raises:
        UserError: if the folder is neither; the message says what was found instead.
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
    """What to call the model of a folder: the name of the run, or of the folder if the model is not in a run."""
    folder = Path(os.path.realpath(path))  # Path.resolve raises where links lead in a circle
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name or "model"


def load_model(
    path: str | os.PathLike[str], device: "torch.device", dtype: "torch.dtype | None" = None
) -> tuple["YocoUForCausalLM", "PreTrainedTokenizerFast"]:
    """Load the model of a run folder or a saved model, in evaluation mode, and its tokenizer.

    Args:
        dtype: of the weights; float32 by default, whatever the files hold.

    Raises:
        UserError: if a file is missing or damaged, the model is not one of this project, or its vocabulary is too small for the
            tokenizer.
    """
    import torch
    from transformers.utils import logging

    from yoco_u.data import load_tokenizer, vocabulary_size
    from yoco_u.model import YocoUConfig, YocoUForCausalLM

    folder = model_folder(path)
    verify_checksums(folder, f"copy it again, or train again; if you changed it on purpose, remove {SUMS}")
    kind = read_json(folder / "config.json", dict[str, Any]).get("model_type")
    if kind != "yoco_u":
        raise UserError(f"{folder}: the model_type is {kind!r}, expected 'yoco_u'; give a model of this project")
    logging.disable_progress_bar()
    try:
        config = YocoUConfig.from_pretrained(folder)
        model, info = YocoUForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # safetensors, json and transformers raise nearly anything on damaged files
        raise UserError(f"{folder}: cannot load the model ({first_line(error)}); the folder is damaged") from None
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights lack {min(info['missing_keys'])}; the folder is damaged")
    tokenizer = load_tokenizer(_tokenizer_folder(folder))
    if (needed := vocabulary_size(tokenizer)) > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {needed - 1}, but the model's vocab_size is {config.vocab_size}; "
            "give the model the tokenizer that it was trained with"
        )
    return model.eval().to(device), tokenizer


def read_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a run folder or a saved model, without the model.

    Raises:
        UserError: if it is missing or damaged, or of a kind that this project does not read.
    """
    from yoco_u.data import load_tokenizer

    return load_tokenizer(_tokenizer_folder(model_folder(path)))


def _tokenizer_folder(model: Path) -> Path:
    for candidate in (model, model.parent / "tokenizer"):
        if (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(f"{model}: tokenizer.json is missing; copy the tokenizer's files into this folder")
