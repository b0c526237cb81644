"""One optimizer step: forward and backward passes over the micro-batches of all ranks, then the update of the weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from yoco_u.data import Batch
from yoco_u.device import read_back
from yoco_u.errors import UserError
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.blocks import CrossAttention, GlobalKVProjection
from yoco_u.model.feed_forward import ExpertMixture, balance
from yoco_u.model.loss import EarlyExit
from yoco_u.training.config import RunConfig
from yoco_u.training.distillation import objective
from yoco_u.training.distributed import Distributed
from yoco_u.training.forward import count_targets
from yoco_u.training.optimizer import learning_rate
from yoco_u.training.parallelize import unwrap, without_gradient_sync


class Pass(NamedTuple):
    """How an equal share of the rows of a step is run.

    Attributes:
        num_loops: loop count; the model's own by default.
        early_exit: an earlier exit whose loss is added; none by default.
    """

    num_loops: int | None = None
    early_exit: EarlyExit | None = None


@dataclass(frozen=True)
class StepResult:
    """The loss and gradient norm of a step. The gradients themselves are in the parameters' `grad`.

    Attributes:
        loss: mean nats per target token, over all micro-batches and ranks.
        norm: norm of the gradient of all parameters, before clipping.
        norm_tensor: the same norm as a tensor on the device, which clipping takes.
    """

    loss: float
    norm: float
    norm_tensor: Tensor

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainingStep:
    """An optimizer step in two halves: `gradients` runs the forward and backward passes, `update` changes the weights.

    Between the two the caller looks at the result; it stops there if the loss is not finite.

    Raises:
        UserError: if the rows of a step do not divide among ranks and micro-batches.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, distributed: Distributed) -> None:
        self.model, self.optimizer, self.config, self.distributed = model, optimizer, config, distributed
        self.micro_batch_rows = micro_batch_rows(config, distributed.world_size)
        self.objective = objective(model, config, distributed)
        self.mixtures = [module for module in model.modules() if isinstance(module, ExpertMixture)]

    def gradients(self, batch: Batch, passes: Sequence[Pass] = (Pass(),)) -> StepResult:
        """Leave in the parameters the gradients of the mean loss over the target tokens of all ranks.

        A GPU is waited for once, at the end, where loss and norm are read.

        A micro-batch is weighted by its share of the target tokens, so that neither accumulation nor the number of processes
        changes the result beyond rounding.

        Args:
            batch: this rank's rows of the step.
            passes: the last of which uses every parameter that one of them uses. Pass i of n runs the rows i, i + n, i + 2n and
                so on, so neither does the number of processes change which row is run how.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        targets = self.distributed.sum(count_targets(batch["shift_labels"]))
        loss = torch.zeros((), device=self.distributed.device)
        for part, one, is_last in self._micro_batches(batch, passes):
            share = count_targets(part["shift_labels"]) / targets
            with nullcontext() if is_last else without_gradient_sync(self.model):
                part_loss = self.objective(part, one.num_loops, one.early_exit)
                # DDP and FSDP average the gradients of the ranks, but the sum is needed: each share is of all ranks' targets.
                (part_loss * (share * self.distributed.world_size)).backward()
            loss += part_loss.detach() * share
        norm = _whole(get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        found = read_back(torch.stack([loss, norm.to(loss.dtype)]))
        return StepResult(self.distributed.sum(found[0]), found[1], norm)

    def update(self, result: StepResult, step: int) -> float:
        """Clip the gradients, change the weights by them, and balance the experts.

        Args:
            result: what `gradients` returned.
            step: number of this step, from 0.

        Returns:
            The learning rate of the step.
        """
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clip_grads_with_norm_(self.model.parameters(), self.config.optimizer.clip_norm, result.norm_tensor)
        self.optimizer.step()
        balance(self.mixtures, self.distributed.sum_tensor)
        return rate

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config.optimizer, step, self.config.training.steps)

    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters whose gradients are not finite. Every rank must call it."""
        named = ((name, p.grad) for name, p in unwrap(self.model).named_parameters() if p.grad is not None)
        return [name for name, grad in named if not math.isfinite(_whole(get_total_norm([grad])).item())]

    def _micro_batches(self, batch: Batch, passes: Sequence[Pass]) -> Iterator[tuple[dict[str, Tensor], Pass, bool]]:
        """The batch in parts of `micro_batch_rows` rows, how each is run, and whether it is the last one."""
        rows, n = batch["input_ids"].shape[0], len(passes)
        for number, one in enumerate(passes):
            for first in range(number, rows, n * self.micro_batch_rows):
                end = first + n * self.micro_batch_rows
                part = {name: tensor[first:end:n] for name, tensor in batch.items() if isinstance(tensor, Tensor)}
                yield part, one, number == n - 1 and end >= rows


@contextmanager
def scheduled(model: YocoUForCausalLM, config: RunConfig, step: int) -> Iterator[None]:
    """Let the model have the window and the rotary positions of a training step while the block runs."""
    inner, own = model.model, model.model.architecture
    rotation = config.cross_rotation_at(step)
    fading = [one for one in model.modules() if isinstance(one, CrossAttention | GlobalKVProjection)] if rotation else []
    inner.architecture = own.model_copy(update={"window": config.window_at(step)})
    inner.cross_rotation = rotation or 1.0
    for one in fading:
        one.rope = True
    try:
        yield
    finally:
        inner.architecture, inner.cross_rotation = own, 1.0
        for one in fading:
            one.rope = own.rope_cross


def micro_batch_rows(config: RunConfig, world_size: int) -> int:
    """Rows per forward pass of one process: the config's micro_batch_rows, or all that are run alike where these are fewer.

    Raises:
        UserError: if the rows of a step do not divide among processes and micro-batches.
    """
    training = config.training
    draws = training.loop_draw.per_step if training.loop_draw else 1
    rows, remainder = divmod(training.batch_rows, world_size * draws)
    micro = min(training.micro_batch_rows, rows)
    if remainder or rows % micro:
        drawn = f" and {draws} draws (loop_draw.per_step)" if draws > 1 else ""
        raise UserError(
            f"training.batch_rows {training.batch_rows} does not divide among {world_size} processes{drawn} of "
            f"micro_batch_rows {training.micro_batch_rows}; choose a multiple of "
            f"{world_size * draws * training.micro_batch_rows}"
        )
    return micro


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
