"""The model of a finished run, made anew from the last checkpoint where `model/` is missing or damaged."""

from pathlib import Path

from yoco_u.checksums import check_changes, verify_checksums
from yoco_u.data import DatasetIndex, end_of_text_id, load_tokenizer
from yoco_u.errors import UserError
from yoco_u.folders import check_part
from yoco_u.loading import tokenizer_folder
from yoco_u.model import save_model
from yoco_u.model.saving import lost_model
from yoco_u.training.checkpoint import load_weights, step_name
from yoco_u.training.config import RunConfig
from yoco_u.training.ownership import run_id
from yoco_u.training.run_folder import RunFolder, run_dataset
from yoco_u.training.starting import first_model


def restore_model(config: RunConfig, folder: RunFolder) -> str | None:
    """Make `model/` of a finished run anew if it is missing or does not fit its checksums. One process calls it.

    Returns:
        What was done, and why; None if the model is there.

    Raises:
        UserError: if the last checkpoint is missing, damaged, or not the run's own, or the tokenizer is damaged, or what is in
            the model's place is not ours, or was changed on purpose.
    """
    if (problem := lost_model(folder.model)) is None:
        return None
    check_part(folder.model)
    check_changes(folder.model, kept=True)
    last = folder.checkpoints / step_name(config.training.steps)
    mend = f"copy it or {folder.model} back, or remove {folder.summary}, and the same command trains to the end again"
    if not last.is_dir():
        raise UserError(f"{last}: is missing, so that model/ cannot be made anew ({problem}); {mend}")
    verify_checksums(last, mend)
    run_id(folder, config, last)
    tokenizer = load_tokenizer(_tokenizer(config, folder))
    model = first_model(config, end_of_text_id(tokenizer), folder.tokenizer)
    load_weights(last, model, config.architecture)
    save_model(model, tokenizer, folder.model)
    return f"made model/ anew from {last} ({problem})"


def _tokenizer(config: RunConfig, folder: RunFolder) -> Path:
    source = folder.tokenizer
    if not source.exists():
        start = config.start_from
        source = tokenizer_folder(start) if start is not None else DatasetIndex.load(run_dataset(folder.path)).tokenizer
    folder.copy_tokenizer(source)
    return folder.tokenizer
