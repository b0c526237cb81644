"""Saving a model as a Hugging Face folder, with the tokenizer beside the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from yoco_u.checksums import write_checksums
from yoco_u.files import replacing_folder


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` read, with checksums. It appears whole or not at all.

    Raises:
        UserError: if something that is not ours is there.
        OSError: if it cannot be written.
    """
    with replacing_folder(folder) as beside, _no_progress_bar():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        weights_and_code = [file for kind in ("*.safetensors", "*.py") for file in beside.glob(kind)]
        write_checksums(beside, [*weights_and_code, beside / "config.json", beside / "tokenizer.json"])


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
