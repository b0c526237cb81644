"""Distillation: a run whose loss comes from a teacher, mostly the model that the run's model was converted from.

`layers` trains what a conversion made anew: each cross block gets the teacher's own input, and learns to give the teacher's
output from the global KVs. `logits` trains the whole model to expect what the teacher expects. The teacher runs in the same
process, on the same tokens, so nothing is stored, and a run continues exactly as any other.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from yoco_u.errors import UserError
from yoco_u.loading import check_model, load_model
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.blocks import Block, blocks_of
from yoco_u.model.loss import LOGITS, EarlyExit, SoftTargets
from yoco_u.training.config import RunConfig
from yoco_u.training.distributed import Distributed
from yoco_u.training.forward import DTYPES, batch_loss, on_device
from yoco_u.training.parallelize import compile_model, unwrap
from yoco_u.training.settings import DistillationConfig, TrainingConfig

Objective = Callable[[Mapping[str, Any], int | None, EarlyExit | None], Tensor]
"""The loss of a micro-batch, the mean over its targets, from its tensors, the loop count, and an earlier exit if any."""


def objective(model: nn.Module, config: RunConfig, distributed: Distributed) -> Objective:
    """What a run minimizes: the cross-entropy of the next token, or what its teacher asks for.

    Args:
        model: a causal LM on the device, or one that `parallelize` wrapped.
        config: one that `check_teacher` has checked.
    """
    device, dtype = distributed.device, config.training.dtype
    if config.distillation is None:
        return lambda part, num_loops, early_exit: batch_loss(model, part, device, dtype, num_loops, early_exit=early_exit)
    teacher = load_teacher(config, device)
    if config.distillation.stage == "layers":
        return LayerLoss(unwrap(model), teacher, dtype)
    return LogitLoss(model, teacher, config.distillation, device, dtype)


def check_teacher(config: RunConfig, teaching: DistillationConfig, distributed: Distributed) -> None:
    """Check that the teacher of a run is there and fits the model, before anything is made.

    Raises:
        UserError: if it is missing or damaged, or does not fit.
    """
    path, model = teaching.teacher, config.architecture
    teacher = distributed.on_main(lambda: check_model(path)).architecture
    alike = {"vocab_size": (teacher.vocab_size, model.vocab_size)}
    if teaching.stage == "layers":
        if distributed.world_size > 1:
            raise UserError("distillation.stage layers runs in one process; start it without torchrun")
        alike["hidden_size"] = teacher.hidden_size, model.hidden_size
        alike["number of layers"] = sum(stage.layers for stage in teacher.stages), sum(stage.layers for stage in model.stages)
    for name, (theirs, ours) in alike.items():
        if theirs != ours:
            raise UserError(
                f"{path}: its {name} is {theirs}, that of the run's model {ours}; a teacher needs the same"
                + (" with distillation.stage layers" if name != "vocab_size" else "")
            )


def load_teacher(config: RunConfig, device: torch.device) -> YocoUForCausalLM:
    """The teacher, in evaluation mode and without gradients."""
    assert config.distillation is not None
    teacher, _ = load_model(config.distillation.teacher, device)
    compile_model(teacher, compilation(config).compile, device)
    return teacher.requires_grad_(False)


def freeze(model: YocoUForCausalLM, config: DistillationConfig | None) -> None:
    """Leave only those parameters to training that the stage of a distillation trains."""
    if config is None or config.trains_all:
        return
    assert model.model.global_kv is not None
    model.requires_grad_(False)
    model.model.global_kv.requires_grad_(True)
    if config.stage == "layers":
        for block in _cross_blocks(model):
            block.attn.requires_grad_(True)
            block.attn_norm.requires_grad_(True)
        return
    for stack, stage in zip(model.model.stages, model.model.architecture.stages, strict=True):
        stack.requires_grad_(stage.attention == "cross")
    model.model.norm.requires_grad_(True)


def compilation(config: RunConfig) -> TrainingConfig:
    """How the model of a run is trained: layer by layer it is not compiled, since what is kept of each block is not traced."""
    if config.distillation is None or config.distillation.stage == "logits":
        return config.training
    return config.training.model_copy(update={"compile": "off"})


class LogitLoss:
    """`share` times the divergence from the teacher, and 1 - share times the cross-entropy."""

    def __init__(
        self, model: nn.Module, teacher: YocoUForCausalLM, config: DistillationConfig, device: torch.device, dtype: str
    ) -> None:
        self.model, self.teacher, self.config, self.device, self.dtype = model, teacher, config, device, dtype

    def __call__(self, part: Mapping[str, Any], num_loops: int | None, early_exit: EarlyExit | None = None) -> Tensor:
        soft = self.soft_targets(part)
        return batch_loss(self.model, part, self.device, self.dtype, num_loops, soft_targets=soft, return_logits=False)

    @torch.no_grad()
    def soft_targets(self, part: Mapping[str, Any]) -> SoftTargets:
        """The teacher's likeliest tokens in the place of each token, chunk by chunk."""
        inputs = on_device(part, self.device)
        inputs.pop("shift_labels")
        ids, log_probs = [], []
        with torch.autocast(self.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32"):
            hidden = self.teacher.model(**inputs, use_cache=False).last_hidden_state
            size = max(1, LOGITS // self.teacher.config.vocab_size)
            for chunk in hidden.flatten(0, 1).split(size):
                logits = self.teacher.lm_head(chunk).float()
                found = logits.topk(min(self.config.top_k, logits.shape[-1]), dim=-1)
                ids.append(found.indices)
                log_probs.append(found.values - logits.logsumexp(-1, keepdim=True))
        shape = (*hidden.shape[:2], -1)
        return SoftTargets(torch.cat(ids).view(shape), torch.cat(log_probs).view(shape), self.config.share)


class LayerLoss:
    """For each cross block, how far its change of the teacher's hidden states is from the teacher's own.

    The loss is the mean over the blocks of |change - teacher's change|^2 / |teacher's change|^2, over all tokens.
    """

    def __init__(self, model: YocoUForCausalLM, teacher: YocoUForCausalLM, dtype: str) -> None:
        self.model, self.dtype = model, dtype
        theirs = list(blocks_of(teacher))[-model.model.architecture.cross_layers :]
        self.twins: dict[nn.Module, Block] = dict(zip(_cross_blocks(model), theirs, strict=True))  # the teacher's, by ours
        self.teacher = teacher

    def __call__(self, part: Mapping[str, Any], num_loops: int | None, early_exit: EarlyExit | None = None) -> Tensor:
        inputs = on_device(part, self.model.device)
        inputs.pop("shift_labels")
        begin: dict[nn.Module, Tensor] = {}  # what each block of the teacher reads,
        end: dict[nn.Module, Tensor] = {}  # and what it writes
        losses: list[Tensor] = []

        def keep_input(block: nn.Module, arguments: tuple[Any, ...]) -> None:
            begin[block] = arguments[0]

        def keep_output(block: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            end[block] = output[0]

        def give_input(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return begin[self.twins[block]], *arguments[1:]

        def compare(block: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            x, y = begin[self.twins[block]].float(), end[self.twins[block]].float()
            losses.append((output[0].float() - y).square().sum() / (y - x).square().sum())

        with torch.autocast(self.model.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32"), ExitStack() as hooks:
            for theirs in self.twins.values():
                hooks.callback(theirs.register_forward_pre_hook(keep_input).remove)
                hooks.callback(theirs.register_forward_hook(keep_output).remove)
            with torch.no_grad():
                self.teacher.model(**inputs, use_cache=False)
            for ours in self.twins:
                hooks.callback(ours.register_forward_pre_hook(give_input).remove)
                hooks.callback(ours.register_forward_hook(compare).remove)
            self.model.model(**inputs, use_cache=False, num_loops=num_loops)
        return torch.stack(losses).mean()


def _cross_blocks(model: YocoUForCausalLM) -> Iterator[Block]:
    for stack, stage in zip(model.model.stages, model.model.architecture.stages, strict=True):
        if stage.attention == "cross":
            yield from blocks_of(stack)
