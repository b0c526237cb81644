"""What runs of TRL's trainers have in common: a folder that says what is trained in it, checkpoints, and going on from them."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from yoco_u.checksums import check_changes, verify_checksums, write_checksums
from yoco_u.data.places import absolute, same_place, seen_from
from yoco_u.errors import UserError, first_line, import_optional, naming
from yoco_u.evaluation.finite import non_finite_weight
from yoco_u.files import DamagedFile, read_json, write_json
from yoco_u.folders import check_part, check_place, claim
from yoco_u.loading import load_model, model_folder, weights_digest
from yoco_u.model import YocoUForCausalLM, save_model
from yoco_u.model.balancing import BalanceExperts
from yoco_u.model.saving import lost_model
from yoco_u.tuning.settings import TuningSettings

FOLDER = "fine-tuning"
"""The kind of mark that the folder bears."""
_SETTINGS = "settings.json"


class _Begun(BaseModel):
    begun: datetime | None = None  # which earlier versions did not write


def begin_time(folder: Path) -> datetime:
    """When the run in a folder was begun, by which chat templates write the date; now, where there is none."""
    return read_json(folder / _SETTINGS, _Begun, _Begun()).begun or datetime.now()


@contextmanager
def begun(
    folder: Path, own: dict[str, Any], made: Sequence[Any], now: datetime, say: Callable[[str], None]
) -> Iterator[dict[str, Any] | None]:
    """Claim a folder for this process, and write down what is trained in it.

    Args:
        own: the model's path, the paths of the data, and the settings.
        made: what training reads, as JSON has it.
        now: when the run is begun.
        say: told of a damaged summary or a lost model, which are made anew, and where nothing is to be done.

    Yields:
        The summary, where the same was trained to its end before and the model is there.

    Raises:
        UserError: if it holds something else, or a run of something else, or another process trains there.
        OSError: if the disk is full in the block, or cannot be written to; it names the folder where no file is known.
    """
    claim(folder, FOLDER)
    lock, file, summary = FileLock(folder / ".lock"), folder / _SETTINGS, folder / "summary.json"
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process is training there; wait for it, or choose another folder") from None
    with held, naming(folder):
        data = hashlib.sha256(json.dumps(made).encode()).hexdigest()
        contents = {"model": weights_digest(own["model"]), "data": data}
        if file.exists():
            _check_same(folder, read_json(file, dict[str, Any]), own, contents)
        else:
            write_json(file, own | {"contents": contents, "working_folder": seen_from(folder), "begun": now.isoformat()})
        finished = read_json(summary, dict[str, Any], {}, say) or None
        if finished is not None and (problem := lost_model(folder / "model")) is not None:
            say(f"{folder}: is finished, but not its model, which is made again ({problem})")
            finished = None
        if finished is None:
            check_part(folder / "model")
            check_changes(folder / "model", kept=True)
            check_place(summary)
        else:
            say(f"{folder}: is finished, at step {finished.get('steps')}; nothing to do")
        yield finished


def _check_same(folder: Path, before: dict[str, Any], own: dict[str, Any], contents: dict[str, str]) -> None:
    begin = folder / str(before.get("working_folder", absolute(os.curdir)))
    known = [key for key in own if key in before or "begun" in before]  # an earlier version wrote down less
    for key in (key for key in known if not _same(before.get(key), own[key], begin)):
        raise UserError(f"{folder}: was begun with another {key}; choose another folder, or the same {key}")
    for key in (key for key in contents if before.get("contents", contents).get(key) != contents[key]):
        raise UserError(f"{folder}: was begun when other things were in {key}; choose another folder")


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
    _check_generation(path, model)
    return model, tokenizer


def _check_generation(path: str | Path, model: YocoUForCausalLM) -> None:
    """Make sure that what the source says of sampling can be saved with the model; transformers only warns of it until then.

    Raises:
        UserError: if it cannot.
    """
    found = model.generation_config
    if found.do_sample is None and (found.temperature, found.top_k, found.top_p) != (None, None, None):
        found.do_sample = True
    try:
        found.validate(strict=True)
    except ValueError as error:
        raise UserError(f"{model_folder(path)}: generation_config.json: {first_line(error)}; mend it") from None


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
        "logging_nan_inf_filter": False,  # which reports a loss of 0 where there is none
        "report_to": [],
        "ddp_broadcast_buffers": False,  # experts count their tokens in buffers
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "disable_tqdm": True,
    }


def lora(settings: TuningSettings) -> Any:
    """The adapters of the settings, a `peft.LoraConfig`; None for all weights."""
    if not settings.lora_rank:
        return None
    peft = import_optional("peft", "fine-tuning needs peft", "tuning")
    return peft.LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")


def train(trainer: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train from the newest checkpoint of the folder, or from the beginning, and save the model in `model/`.

    Args:
        trainer: one of TRL's.
        say: told the loss or reward of about fifty steps.

    Returns:
        What the trainer logged.

    Raises:
        UserError: if a loss, a gradient, a reward or a weight is not finite.
    """
    trainer.remove_callback(PrinterCallback)  # which writes to standard output
    trainer.add_callback(_Watched(say))
    if isinstance(trainer.model, YocoUForCausalLM):  # and not adapters, beside which the experts stay as they are
        trainer.add_callback(BalanceExperts())
        experts = trainer.model.model.architecture.experts
        if experts is not None and experts.auxiliary_loss_weight:
            say("the auxiliary loss of the experts is left out: TRL computes the loss itself")
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
    if (name := non_finite_weight(tuned)) is not None:
        raise UserError(f"{name} holds NaN or infinity after the last step; {_LOWER}")
    save_model(tuned.float(), tokenizer, folder / "model")
    return list(trainer.state.log_history)


def _newest(checkpoints: Path, say: Callable[[str], None]) -> tuple[Path, TrainerState] | tuple[None, None]:
    """The newest checkpoint that is not damaged and was written to its end, which the trainer's state is."""
    found = [folder for folder in checkpoints.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(found, key=lambda one: int(one.name.removeprefix("checkpoint-")), reverse=True):
        try:
            verify_checksums(folder, "the checkpoint is passed over")
            return folder, TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        except DamagedFile as error:
            say(str(error))
        except (FileNotFoundError, ValueError, TypeError):
            say(f"{folder}: was not written to its end; it is passed over")
    return None, None


_LOWER = "lower learning_rate, in another folder"


class _Watched(TrainerCallback):
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        figures = {name: float(logs[name]) for name in ("reward", "loss", "grad_norm") if logs and name in logs}
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} in step {state.global_step}; {_LOWER}")
        if figures and state.global_step % max(1, state.max_steps // 50) == 0:
            name, value = next(iter(figures.items()))
            self._say(f"step {state.global_step}/{state.max_steps}  {name} {value:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_checksums(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
