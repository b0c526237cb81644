"""A small model that can be fine-tuned on chats: a converted Llama with a chat template."""

from pathlib import Path
from typing import Any

from checkpoints import save

from yoco_u.conversion import convert, read_source, target_architecture, write


def save_chat_model(folder: Path, template: str, changes: dict[str, Any]) -> Path:
    """Save one in `folder`, whose architecture is the source's with changes, and return its place."""
    save(folder / "source", "llama")
    source = read_source(str(folder / "source"))
    source.tokenizer.chat_template = template
    target = target_architecture(source.model.model.architecture, changes)
    write(convert(source, target, "mean"), source, folder / "model")
    return folder / "model"
