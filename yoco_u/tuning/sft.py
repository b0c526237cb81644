"""Supervised fine-tuning: TRL's trainer on our model, on tokens that are made and marked here."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from yoco_u.device import environment, find_device
from yoco_u.errors import UserError
from yoco_u.files import claim, write_json
from yoco_u.loading import load_model
from yoco_u.model import save_model
from yoco_u.model.loss import IGNORED
from yoco_u.tuning.chats import examples, read_chats
from yoco_u.tuning.settings import SFTSettings

FOLDER = "fine-tuning"
"""The kind of mark that the folder bears."""


def fine_tune(
    model_path: str | Path,
    files: Sequence[Path],
    settings: SFTSettings,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Fine-tune a model on chats, or continue where that was interrupted.

    Args:
        model_path: a run or a saved model with a chat template.
        files: JSON lines with messages, see `read_chats`.
        folder: gets `checkpoints/`, `summary.json`, and the fine-tuned model in `model/`.
        say: told what happens, in lines.

    Returns:
        The summary: steps, tokens, how many of them are the assistant's, and the loss of each logged step.

    Raises:
        UserError: if TRL or PEFT is missing, a chat is damaged, the model has no chat template, or the folder holds something
            else.
    """
    trl = _needed("trl")
    peft = _needed("peft") if settings.lora_rank else None
    device = find_device("auto")
    model, tokenizer = load_model(model_path, device)
    made = list(examples(read_chats(files), tokenizer))
    if settings.num_loops is not None:
        model.model.at_loops(settings.num_loops)
        model.config.num_loops = settings.num_loops
    claim(folder, FOLDER)
    _check_same(folder, settings, model_path, files)
    counts = {
        "chats": len(made),
        "tokens": sum(len(one.input_ids) for one in made),
        "assistant_tokens": sum(sum(one.assistant) for one in made),
    }
    say(f"{counts['chats']:,} chats, {counts['tokens']:,} tokens, {counts['assistant_tokens']:,} of them the assistant's")
    rows = Dataset.from_list(
        [
            {
                "input_ids": one.input_ids,
                "labels": [token if own else IGNORED for token, own in zip(one.input_ids, one.assistant, strict=True)],
            }
            for one in made
        ]
    )
    arguments = trl.SFTConfig(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        max_length=settings.length,
        packing=True,
        per_device_train_batch_size=settings.micro_batch_rows,
        gradient_accumulation_steps=max(1, settings.batch_rows // settings.micro_batch_rows),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=0.03,
        lr_scheduler_type="cosine",
        seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        disable_tqdm=True,
    )
    lora = None
    if peft is not None:
        lora = peft.LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.remove_callback(PrinterCallback)  # which writes to standard output
    trainer.add_callback(_Told(say))
    last = get_last_checkpoint(str(folder / "checkpoints")) if (folder / "checkpoints").is_dir() else None
    if last is not None:
        say(f"continuing from {last}")
    trainer.train(resume_from_checkpoint=last)
    tuned = trainer.model.merge_and_unload() if lora is not None else trainer.model
    save_model(tuned.float(), tokenizer, folder / "model")
    losses = [{"step": one["step"], "loss": one["loss"]} for one in trainer.state.log_history if "loss" in one]
    summary = {"steps": trainer.state.global_step} | counts | {"environment": environment(device), "losses": losses}
    write_json(folder / "summary.json", summary)
    return summary


class _Told(TrainerCallback):
    """Tells the loss of about fifty steps."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.global_step % max(1, state.max_steps // 50) == 0:
            self._say(f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}")


def _check_same(folder: Path, settings: SFTSettings, model_path: str | Path, files: Sequence[Path]) -> None:
    """Write down what is trained; refuse to go on with something else."""
    own = {"model": str(model_path), "data": [str(file) for file in files], "settings": settings.model_dump(mode="json")}
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != own:
            key = next(key for key in own if own[key] != before.get(key))
            raise UserError(f"{folder}: was begun with another {key}; choose another folder, or the same {key}")
        return
    write_json(file, own)


def _needed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"fine-tuning needs {name}: pip install 'yoco-u[tuning]'") from None
