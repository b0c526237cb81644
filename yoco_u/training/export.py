"""The trained model as a Hugging Face folder, with the tokenizer beside the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging

from yoco_u.checksums import write_checksums
from yoco_u.data import load_tokenizer
from yoco_u.files import replacing_folder
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.training.checkpoint import full_weights
from yoco_u.training.distributed import Distributed
from yoco_u.training.run_folder import RunFolder


def export_model(model: nn.Module, config: YocoUConfig, folder: RunFolder, distributed: Distributed) -> None:
    """Write `model/` of a run folder, which `AutoModelForCausalLM` and `AutoTokenizer` read. Every rank must call it."""
    weights = full_weights(model)

    def save() -> None:
        with torch.device("meta"):
            whole = YocoUForCausalLM(config)
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        with replacing_folder(folder.model) as beside, _no_progress_bar():
            whole.save_pretrained(beside)
            load_tokenizer(folder.tokenizer).save_pretrained(beside)
            write_checksums(beside, [*beside.glob("*.safetensors"), beside / "config.json", beside / "tokenizer.json"])

    distributed.on_main(save)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
