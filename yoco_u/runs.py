"""Finished things read back: a run folder's records, a run's or a saved model's weights and tokenizer, with clear errors."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoco_u.errors import UserError
from yoco_u.typed import load_yaml, parse

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from yoco_u.model import YocoUForCausalLM
    from yoco_u.training.config import RunConfig

SAMPLES = "samples.json"


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Attributes:
        records: the lines of metrics.jsonl, see `yoco_u.training.metrics`.
        environment: what the run ran on; empty if unknown.
        samples: `{"prompt": ..., "text": ...}` each, the text without the prompt; empty if none were made.
    """

    folder: Path
    config: "RunConfig"
    records: list[dict[str, Any]]
    environment: dict[str, Any]
    samples: list[dict[str, Any]]

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind: `train` or `evaluation`."""
        return [record for record in self.records if record["kind"] == kind]


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether this is a run folder, and not a saved model."""
    return (Path(path) / "config.yaml").is_file()


def read_run_config(path: str | os.PathLike[str]) -> "RunConfig":
    """The resolved config of a run folder.

    Raises:
        UserError: if the folder holds no run.
    """
    from yoco_u.training.config import RunConfig

    file = Path(path) / "config.yaml"
    if not is_run(path):
        raise UserError(f"{path}: no run here (config.yaml is missing); give a folder that `yoco-u train` wrote")
    return parse(RunConfig, load_yaml(file), str(file))


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder, finished or not.

    Raises:
        UserError: if it holds no run, a run without a step, or a damaged file.
    """
    from yoco_u.training.metrics import METRICS, read_metrics

    folder = Path(path)
    config = read_run_config(folder)
    try:
        records = read_metrics(folder)
    except ValueError as error:
        raise UserError(f"{folder / METRICS}: not JSON lines ({error}); the file is damaged") from None
    if not records:
        raise UserError(f"{folder}: the run has no metrics yet; run `yoco-u train` first")
    environment, samples = read_json(folder / "environment.json", {}), read_json(folder / SAMPLES, [])
    return Run(folder, config, records, environment, samples)


def read_json(path: Path, default: Any) -> Any:
    """What a JSON file holds, `default` if there is none.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it as JSON ({error}); the file is damaged") from None


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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder}: cannot load the model ({reason}); the folder is damaged") from None
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
