"""The model of a run before its first step: with new weights, or with those of a saved model."""

from pathlib import Path

import torch

from yoco_u.architecture import Architecture
from yoco_u.config import parse
from yoco_u.data import DatasetIndex, load_tokenizer
from yoco_u.device import check_bfloat16
from yoco_u.errors import UserError
from yoco_u.loading import check_model, load_model, model_folder, read_tokenizer, saved_architecture
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.model.quantization import require_torchao
from yoco_u.training.config import RunConfig
from yoco_u.training.distillation import check_teacher
from yoco_u.training.distributed import Distributed
from yoco_u.training.metrics import check_wandb
from yoco_u.training.step import micro_batch_rows


def first_model(config: RunConfig, eot_id: int, tokenizer: Path) -> YocoUForCausalLM:
    """The model that a run begins with; `torch.manual_seed` draws what is new.

    Args:
        eot_id: the token that begins the documents of the run's dataset.
        tokenizer: the folder of its tokenizer.
    """
    if config.start_from is None:
        padding = load_tokenizer(tokenizer).pad_token_id
        return YocoUForCausalLM(YocoUConfig.from_architecture(
            config.architecture, initializer_range=config.initializer_range,
            bos_token_id=eot_id, eos_token_id=eot_id, pad_token_id=eot_id if padding is None else padding,
        ))  # fmt: skip
    before, _ = load_model(config.start_from, torch.device("cpu"))
    fields = before.config.to_dict() | config.architecture.model_dump(mode="json")
    model = YocoUForCausalLM(YocoUConfig.from_dict(fields | {"num_loops": None}))
    model.load_state_dict(before.state_dict(), strict=False)
    model.generation_config = before.generation_config
    return model


def check_tokenizers(config: RunConfig, index: DatasetIndex) -> None:
    """Check that what a run starts from, and its teacher, mean the tokens of the dataset by their ids.

    Args:
        index: of the run's dataset.

    Raises:
        UserError: if one has another tokenizer. A teacher may have further tokens.
    """
    own = load_tokenizer(index.tokenizer).get_vocab()
    models = {config.start_from: True} if config.start_from is not None else {}
    if config.distillation is not None:
        models.setdefault(config.distillation.teacher, False)
    for model, alike in models.items():
        theirs = read_tokenizer(model).get_vocab()
        if theirs != own if alike else not own.items() <= theirs.items():
            raise UserError(
                f"{index.folder}: was prepared with another tokenizer than that of {model}; "
                f"prepare it with data.tokenizer={model_folder(model)}"
            )


def check_start(config: RunConfig, distributed: Distributed) -> None:
    """Check, before anything is made, that a run can begin: its processes and libraries, what it starts from, and its teacher.

    Raises:
        UserError: if rows do not divide among the processes, the device has no bfloat16, a library is not installed, a folder
            is missing or damaged, or weights do not fit the run's architecture.
    """
    micro_batch_rows(config, distributed.world_size)
    if config.training.dtype == "bfloat16":
        check_bfloat16(distributed.device)
    if config.training.weights is not None:
        require_torchao()
    if (project := config.training.wandb_project) is not None:
        distributed.on_main(lambda: check_wandb(project))
    if config.start_from is not None:
        read_tokenizer(config.start_from)
        _check_weights(config, config.start_from, distributed)
    if config.distillation is not None:
        read_tokenizer(config.distillation.teacher)
        check_teacher(config, config.distillation, distributed)


def _check_weights(config: RunConfig, start: str, distributed: Distributed) -> None:
    distributed.on_main(lambda: check_model(start))
    saved = parse(Architecture, saved_architecture(start), start)
    if config.architecture.tie_word_embeddings and not saved.tie_word_embeddings:
        raise UserError(
            f"{start}: has an LM head that is not its embedding, so that tying would lose one of them; set "
            "architecture.tie_word_embeddings to false"
        )
    found = _shapes(saved)
    expected = _shapes(config.architecture)
    for name, shape in expected.items():
        if name not in found and not name.endswith("loop_gates"):
            raise UserError(f"{start}: has no {name}, which the run's architecture needs; convert it first")
        if name in found and found[name] != shape:
            raise UserError(
                f"{start}: {name} has shape {tuple(found[name])}, but the run's architecture needs {tuple(shape)}; "
                "convert it first, or leave architecture out"
            )
    if unknown := found.keys() - expected.keys():
        raise UserError(f"{start}: {min(unknown)} has no place in the run's architecture; convert it first")


def _shapes(architecture: Architecture) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
