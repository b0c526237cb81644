"""Loading finished models: weights and tokenizer of a run folder or a saved model.

Torch and transformers are imported when a model is loaded, so that commands which only look at folders start at once.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoco_u.architecture import Architecture
from yoco_u.checksums import SUMS, verify_checksums
from yoco_u.config import parse
from yoco_u.errors import UserError, first_line
from yoco_u.files import read_json
from yoco_u.regular_files import check_regular_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from yoco_u.model import YocoUConfig, YocoUForCausalLM


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a run, which has a `config.yaml`, and not a saved model."""
    return os.path.isfile(Path(path) / "config.yaml")  # false, unlike a Path's, where the folder may not be entered


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
    if is_run(folder) and (folder / "summary.json").is_file():
        raise UserError(
            f"{folder}: the run is finished, but model/config.json is missing; run `yoco-u train` again to make model/ anew "
            "from the last checkpoint"
        )
    if is_run(folder):
        raise UserError(f"{folder}: the run is not finished (model/ is missing); run `yoco-u train` again to finish it")
    if runs := sorted(path.name for path in folder.glob("*/") if is_run(path)):
        raise UserError(f"{folder}: holds several runs; give one of them: {', '.join(runs[:8])}{', ...' * (len(runs) > 8)}")
    raise UserError(f"{folder}: neither a run folder (with model/config.json) nor a saved model (with config.json)")


def saved_architecture(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The architecture in the `config.json` of a run folder or a saved model of this project, as plain data.

    Raises:
        UserError: if there is none, or if the config has another `num_loops`, which no architecture says.
    """
    config = read_config(model_folder(path))
    found = {name: config[name] for name in Architecture.model_fields if name in config}
    if config.get("num_loops") is not None:
        check_loops(str(path), parse(Architecture, found, str(path)), config["num_loops"])
    return found


def check_loops(name: str, architecture: Architecture, num_loops: int | None) -> None:
    """Refuse a model that runs another loop count than its stages have, where only its architecture is asked for.

    Raises:
        UserError: if it does; it begins with `name`.
    """
    if num_loops not in (None, architecture.num_loops):
        raise UserError(
            f"{name}: num_loops of its config is {num_loops}, but its stages have {architecture.num_loops}; make a model that "
            f"has one of the two by yoco-u convert, with loops={num_loops} or loops={architecture.num_loops}"
        )


def with_architectures(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run with the architectures that its folders say: of what it starts from, and of its teacher.

    Raises:
        UserError: as of `saved_architecture`.
    """
    settings = dict(settings)
    if isinstance(start := settings.get("start_from"), str) and start:
        own = settings.get("architecture") or {}
        if isinstance(own, dict) and "preset" not in own:
            settings["architecture"] = saved_architecture(start) | own
    teaching = settings.get("distillation")
    if isinstance(teaching, dict) and "architecture" not in teaching and isinstance(teaching.get("teacher"), str):
        settings["distillation"] = teaching | {"architecture": saved_architecture(teaching["teacher"])}
    return settings


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a saved model of this project.

    Raises:
        UserError: if it is missing or damaged, or that of another model.
    """
    config = read_json(folder / "config.json", dict[str, Any])
    if (kind := config.get("model_type")) != "yoco_u":
        raise UserError(f"{folder}: the model_type is {kind!r}, expected 'yoco_u'; convert it with yoco-u convert")
    return config


def model_name(path: str | os.PathLike[str]) -> str:
    """What to call the model of a folder: the name of the run, or of the folder if the model is not in a run."""
    folder = Path(os.path.realpath(path))  # Path.resolve raises where links lead in a circle
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name or "model"


def load_model(
    path: str | os.PathLike[str], device: "torch.device", dtype_of: "Callable[[Architecture], torch.dtype] | None" = None
) -> tuple["YocoUForCausalLM", "PreTrainedTokenizerFast"]:
    """Load the model of a run folder or a saved model, in evaluation mode, and its tokenizer.

    Args:
        dtype_of: the dtype of the weights of an architecture; float32 by default, whatever the files hold.

    Raises:
        UserError: if a file is missing or damaged, the model is not one of this project, its vocabulary is too small for the
            tokenizer, or adapters lie beside it.
    """
    import torch

    from yoco_u.data import load_tokenizer, vocabulary_size
    from yoco_u.model import YocoUForCausalLM

    folder = model_folder(path)
    config = check_model(folder)
    with _telling_damage(folder):
        dtype = torch.float32 if dtype_of is None else dtype_of(config.architecture)
        kwargs = {"config": config, "dtype": dtype, "trust_remote_code": False}
        model = YocoUForCausalLM.from_pretrained(folder, **kwargs)
    if config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise UserError(
            f"{folder}: the config ties the LM head to the embedding, but it is another; set tie_word_embeddings to false"
        )
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    if (needed := vocabulary_size(tokenizer)) > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {needed - 1}, but the model's vocab_size is {config.vocab_size}; "
            "give the model the tokenizer that it was trained with"
        )
    return model.eval().to(device), tokenizer


def check_model(path: str | os.PathLike[str]) -> "YocoUConfig":
    """Check the model of a run folder or a saved model, without loading it: its checksums, and that its tensors fit its config.

    Returns:
        Its config.

    Raises:
        UserError: as of `load_model`.
    """
    from yoco_u.model import YocoUConfig
    from yoco_u.model.saving import check_weights

    folder = model_folder(path)
    check_regular_files(folder)
    check_adapters(folder)
    in_run = folder.name == "model" and is_run(folder.parent)
    again = "run `yoco-u train` again to make model/ anew from the last checkpoint" if in_run else "make the model again"
    verify_checksums(folder, f"copy it again, or {again}; if you changed it on purpose, remove {SUMS}")
    read_config(folder)
    read_json(folder / "generation_config.json", dict[str, Any], {})  # transformers passes over one that is damaged
    with _telling_damage(folder):
        config = YocoUConfig.from_pretrained(folder)
        check_weights(folder, config)
    return config


@contextmanager
def _telling_damage(folder: Path) -> Iterator[None]:
    from yoco_u.model.saving import quiet_transformers

    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:  # safetensors, json and transformers raise nearly anything on damaged files
        raise UserError(f"{folder}: cannot load the model ({first_line(error)}); the folder is damaged") from None


def check_adapters(folder: Path) -> None:
    """Refuse a folder in which adapters of PEFT lie beside weights.

    transformers would load them too, on top of the weights that they name, which may be others; the engine's kernels
    multiply by weights alone.

    Raises:
        UserError: if there are some.
    """
    if (file := folder / "adapter_config.json").exists():
        raise UserError(f"{file}: adapters lie beside the weights; merge them (PEFT's merge_and_unload) or move them away")


def weights_digest(path: str | os.PathLike[str]) -> str:
    """What tells the model of a folder from others: a digest of its checksums; empty if it has none, as one of transformers."""
    sums = model_folder(path) / SUMS
    return hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else ""


def read_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a run folder or a saved model, without the model.

    Raises:
        UserError: if it is missing or damaged, or of a kind that this project does not read.
    """
    from yoco_u.data import load_tokenizer

    return load_tokenizer(tokenizer_folder(path))


def tokenizer_folder(path: str | os.PathLike[str]) -> Path:
    """The folder with the tokenizer of a run folder or a saved model.

    Raises:
        UserError: if it is missing.
    """
    model = model_folder(path)
    for candidate in (model, model.parent / "tokenizer"):
        if (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(f"{model}: tokenizer.json is missing; copy the tokenizer's files into this folder")
