"""Supervised fine-tuning: TRL's trainer on our model, on tokens that are made and marked here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from yoco_u.device import environment, find_device
from yoco_u.errors import UserError, import_optional
from yoco_u.files import write_json
from yoco_u.folders import check_claim
from yoco_u.model.loss import IGNORED
from yoco_u.tuning import runs
from yoco_u.tuning.chats import Example, examples, read_chats
from yoco_u.tuning.settings import SFTSettings


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
        UserError: if TRL or PEFT is missing, there is no chat, one is damaged, the model has no chat template, the settings do
            not fit, the folder holds something else, or another process trains there; if the loss is not finite.
    """
    trl, lora = import_optional("trl", "fine-tuning needs trl", "tuning"), runs.lora(settings)
    check_claim(folder, runs.FOLDER)
    batch, micro = settings.batch_rows, settings.micro_batch_rows
    if batch % micro:
        raise UserError(f"micro_batch_rows {micro} does not divide the {batch} rows of a step; choose a divisor of batch_rows")
    device = find_device("auto")
    model, tokenizer = runs.load(model_path, settings, device)
    now = runs.begin_time(folder)
    written = list(examples(read_chats(files), tokenizer, now))
    made, cut = _within(settings.length, written)
    if not made:
        what = f"answer within length {settings.length}" if cut else "answer" if written else "chat"
        raise UserError(f"no {what} in {', '.join(map(str, files)) or 'no file'}; give files of JSON lines with messages")
    own = {"model": str(model_path), "data": [str(file) for file in files], "settings": settings.model_dump(mode="json")}
    with runs.begun(folder, own, made, now, say) as finished:
        if finished is not None:
            return finished
        counts = {
            "chats": len(made),
            "tokens": sum(len(one.input_ids) for one in made),
            "assistant_tokens": sum(sum(one.assistant) for one in made),
        }
        say(f"{counts['chats']:,} chats, {counts['tokens']:,} tokens, {counts['assistant_tokens']:,} of them the assistant's")
        if cut:
            say(f"{cut:,} chats are longer than length {settings.length}: cut, or left out where no answer is left of them")
        config = trl.SFTConfig(
            **runs.arguments(settings, folder, device),
            num_train_epochs=settings.epochs,
            max_steps=settings.steps or -1,
            max_length=settings.length,
            packing=True,
            gradient_accumulation_steps=batch // micro,
            warmup_steps=0.03,
            lr_scheduler_type="cosine",
        )
        trainer = trl.SFTTrainer(
            model=model, args=config, train_dataset=_rows(made), processing_class=tokenizer, peft_config=lora
        )
        logged = runs.train(trainer, tokenizer, folder, say)
        losses = [{"step": one["step"], "loss": one["loss"]} for one in logged if "loss" in one]
        summary = {"steps": trainer.state.global_step} | counts | {"environment": environment(device), "losses": losses}
        write_json(folder / "summary.json", summary)
        return summary


def _within(length: int, made: list[Example]) -> tuple[list[Example], int]:
    """The examples cut to a length, without those of which no answer is left; and how many were longer."""
    cut = [Example(one.input_ids[:length], one.assistant[:length]) for one in made]
    return [one for one in cut if any(one.assistant)], sum(len(one.input_ids) > length for one in made)


def _rows(made: Sequence[Example]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": one.input_ids,
                "labels": [token if own else IGNORED for token, own in zip(one.input_ids, one.assistant, strict=True)],
            }
            for one in made
        ]
    )
