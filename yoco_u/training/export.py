"""The trained model as a Hugging Face folder, with the tokenizer beside the weights."""

import torch
from torch import nn

from yoco_u.data import load_tokenizer
from yoco_u.model import YocoUConfig, YocoUForCausalLM, save_model
from yoco_u.training.checkpoint import full_weights
from yoco_u.training.distributed import Distributed
from yoco_u.training.parallelize import unwrap
from yoco_u.training.run_folder import RunFolder


def export_model(model: nn.Module, config: YocoUConfig, folder: RunFolder, distributed: Distributed) -> None:
    """Write `model/` of a run folder, which `AutoModelForCausalLM` and `AutoTokenizer` read. Every rank must call it."""
    weights = full_weights(model)

    def save() -> None:
        with torch.device("meta"):
            whole = YocoUForCausalLM(config)
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        whole.generation_config = unwrap(model).generation_config
        save_model(whole, load_tokenizer(folder.tokenizer), folder.model)

    distributed.on_main(save)
