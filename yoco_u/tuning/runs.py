"""What runs of TRL's trainers have in common: a folder that says what is trained in it, checkpoints, and going on from them."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from yoco_u.data.places import absolute, same_place, seen_from
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import non_finite_weight
from yoco_u.files import claim, read_json, write_json
from yoco_u.loading import load_model
from yoco_u.model import YocoUForCausalLM, save_model
from yoco_u.tuning.settings import TuningSettings

FOLDER = "fine-tuning"
"""The kind of mark that the folder bears."""


def needed(name: str) -> ModuleType:
    """A library of the extra `tuning`.

    Raises:
        UserError: if it is missing, with what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"fine-tuning needs {name}: pip install 'yoco-u[tuning]'") from None


def begin(folder: Path, own: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """Claim a folder, and write down what is trained in it.

    Args:
        say: told of a damaged summary, which is made anew.

    Returns:
        The summary, where the same was trained to its end before.

    Raises:
        UserError: if it holds something else, or a run of something else.
    """
    claim(folder, FOLDER)
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, own | {"working_folder": seen_from(folder)})
        return None
    before = read_json(file, dict[str, Any])
    begin = folder / str(before.get("working_folder", absolute(os.curdir)))
    for key in (key for key in own if not _same(before.get(key), own[key], begin)):
        raise UserError(f"{folder}: was begun with another {key}; choose another folder, or the same {key}")
    return read_json(folder / "summary.json", dict[str, Any], {}, say) or None


def _same(old: object, new: object, begin: Path) -> bool:
    """Whether a value is the old one: paths where they lead to the same place, the old ones from the folder `begin`."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_same(one, other, begin) for one, other in zip(old, new, strict=True))
    if isinstance(old, str) and isinstance(new, str):
        return same_place(old, new, lambda path: [absolute(path, begin)])
    return old == new


def load(path: str | Path, settings: TuningSettings, device: torch.device) -> tuple[YocoUForCausalLM, PreTrainedTokenizerFast]:
    """Load the model that is trained further, at the loop count of the settings."""
    model, tokenizer = load_model(path, device)
    if settings.num_loops is not None:
        model.model.at_loops(settings.num_loops)
        model.config.num_loops = settings.num_loops
    return model, tokenizer


def arguments(settings: TuningSettings, folder: Path, device: torch.device) -> dict[str, Any]:
    """Arguments that all of TRL's configs take."""
    return {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": settings.micro_batch_rows,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # which would tell the loss before instead of one that is not finite
        "report_to": [],
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "disable_tqdm": True,
    }


def lora(settings: TuningSettings) -> Any:
    """The adapters of the settings, a `peft.LoraConfig`; None for all weights."""
    if not settings.lora_rank:
        return None
    return needed("peft").LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")


def train(trainer: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train from the newest checkpoint of the folder, or from the beginning, and save the model in `model/`.

    Args:
        trainer: one of TRL's.
        say: told the loss or reward of about fifty steps.

    Returns:
        What the trainer logged.

    Raises:
        UserError: if a weight is not finite in the end.
    """
    trainer.remove_callback(PrinterCallback)  # which writes to standard output
    trainer.add_callback(_Told(say))
    checkpoint, state = _newest(folder / "checkpoints", say)
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    if state is not None and state.global_step == state.max_steps:
        trainer._load_from_checkpoint(str(checkpoint))  # `train` would take one more step
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    model = trainer.model
    tuned = model if isinstance(model, YocoUForCausalLM) else model.merge_and_unload()
    if (damaged := non_finite_weight(tuned)) is not None:
        raise UserError(f"training diverged: {damaged} holds NaN or infinity; lower learning_rate, in another folder")
    save_model(tuned.float(), tokenizer, folder / "model")
    return list(trainer.state.log_history)


def _newest(checkpoints: Path, say: Callable[[str], None]) -> tuple[Path, TrainerState] | tuple[None, None]:
    """The newest checkpoint that was written to its end, which the trainer's state is: its last file."""
    found = [folder for folder in checkpoints.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(found, key=lambda one: int(one.name.removeprefix("checkpoint-")), reverse=True):
        try:
            return folder, TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            say(f"{folder}: was not written to its end; it is passed over")
    return None, None


class _Told(TrainerCallback):
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.global_step % max(1, state.max_steps // 50):
            return
        for name in ("reward", "loss"):
            if logs and name in logs:
                self._say(f"step {state.global_step}/{state.max_steps}  {name} {float(logs[name]):.3f}")
                return
