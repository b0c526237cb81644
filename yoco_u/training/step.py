"""One optimizer step: the gradients of a batch over micro-batches and ranks, and the update that they lead to."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from yoco_u.data import Batch
from yoco_u.errors import UserError
from yoco_u.model.feed_forward import ExpertMixture
from yoco_u.training.config import RunConfig
from yoco_u.training.distributed import Distributed
from yoco_u.training.optimizer import learning_rate
from yoco_u.training.parallelize import unwrap, without_gradient_sync
from yoco_u.training.validation import DTYPES


@dataclass(frozen=True)
class StepResult:
    """What the forward and backward passes of a step came to. The gradients themselves lie in the parameters.

    Attributes:
        loss: nats per target token, over all micro-batches and ranks.
        norm: of the gradient of all parameters, before clipping.
        norm_tensor: the same on the device, for clipping.
    """

    loss: float
    norm: float
    norm_tensor: Tensor

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainingStep:
    """`gradients` runs the forward and backward passes, `update` changes the weights by what they came to.

    Between the two the caller may look at the result, and leave the weights as they were.

    Raises:
        UserError: if the rows of a step do not divide among ranks and micro-batches.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, distributed: Distributed) -> None:
        self.model, self.optimizer, self.config, self.distributed = model, optimizer, config, distributed
        self.micro_batch_rows = micro_batch_rows(config, distributed.world_size)
        self.mixtures = [module for module in model.modules() if isinstance(module, ExpertMixture)]

    def gradients(self, batch: Batch, num_loops: int | None = None) -> StepResult:
        """StepResult of the mean loss over the target tokens of all ranks, left in the parameters.

        Each micro-batch counts by its share of the targets, so that neither accumulation nor the number of processes changes
        the result beyond rounding.

        Args:
            num_loops: loop count of the passes; the model's own by default.
        """
        training, device = self.config.training, self.distributed.device
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        targets = self.distributed.sum(int((batch["shift_labels"] != -100).sum()))
        rows = batch["input_ids"].shape[0]
        loss = torch.zeros((), device=device)
        for first in range(0, rows, self.micro_batch_rows):
            last = first + self.micro_batch_rows >= rows
            part = {k: v[first : first + self.micro_batch_rows] for k, v in batch.items() if isinstance(v, Tensor)}
            share = int((part["shift_labels"] != -100).sum()) / targets
            with nullcontext() if last else without_gradient_sync(self.model):
                with torch.autocast(device.type, DTYPES[training.dtype], enabled=training.dtype != "float32"):
                    inputs = {k: v.to(device, non_blocking=True) for k, v in part.items()}
                    output = self.model(**inputs, num_loops=num_loops, use_cache=False)
                # DDP and FSDP average the gradients of the ranks, where the sum is wanted.
                (output.loss * (share * self.distributed.world_size)).backward()
            loss += output.loss.detach() * share
        norm = _whole(get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        return StepResult(self.distributed.sum(loss.item()), norm.item(), norm)

    def update(self, result: StepResult, step: int) -> float:
        """Clip the gradients of `result` and take step `step` = 0, 1, ... with them. Returns its learning rate."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clip_grads_with_norm_(self.model.parameters(), self.config.optimizer.clip_norm, result.norm_tensor)
        self.optimizer.step()
        self._balance_experts()
        return rate

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config.optimizer, step, self.config.training.steps)

    def _balance_experts(self) -> None:
        if not self.mixtures:
            return
        counts = torch.stack([mixture.tokens_per_expert for mixture in self.mixtures])  # (mixtures, experts)
        self.distributed.sum_tensor(counts)
        for mixture, count in zip(self.mixtures, counts, strict=True):
            mixture.tokens_per_expert.copy_(count)
            mixture.balance()

    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters whose gradients are not finite; every rank calls it."""
        named = ((name, p.grad) for name, p in unwrap(self.model).named_parameters() if p.grad is not None)
        return [name for name, grad in named if not math.isfinite(_whole(get_total_norm([grad])).item())]


def micro_batch_rows(config: RunConfig, world_size: int) -> int:
    """Rows per forward pass of one process: what the config says, or all rows of a process where these are fewer."""
    training = config.training
    rows, remainder = divmod(training.batch_rows, world_size)
    micro = min(training.micro_batch_rows, rows)
    if remainder or rows % micro:
        raise UserError(
            f"training.batch_rows {training.batch_rows} does not divide among {world_size} processes of micro_batch_rows "
            f"{training.micro_batch_rows}; choose a multiple of {world_size * training.micro_batch_rows}"
        )
    return micro


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
