"""Balancing the experts in a training loop of transformers: its `Trainer` calls what is here after each optimizer step."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yoco_u.errors import UserError
from yoco_u.model.feed_forward import ExpertMixture, balance


class BalanceExperts(TrainerCallback):
    """Moves the choice bias of each mixture of experts after every optimizer step, by the load of all processes.

    Pass it as `Trainer(..., callbacks=[BalanceExperts()])`; without it the bias (`MixtureOfExperts.bias_update_rate`) stays
    where it is.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the settings.

        Raises:
            UserError: if processes would take over each other's counts before they are summed, or if the loss is not the
                model's own, of which the auxiliary loss is a part.
        """
        weights = [module.auxiliary_loss_weight for module in model.modules() if isinstance(module, ExpertMixture)]
        if args.label_smoothing_factor and any(weights):
            raise UserError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but its loss leaves out the experts' auxiliary one; "
                "set it to 0, or the experts' auxiliary_loss_weight"
            )
        if args.world_size > 1 and args.ddp_broadcast_buffers is not False:
            raise UserError("the experts count their tokens in buffers of each process; set ddp_broadcast_buffers=False")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        balance([module for module in model.modules() if isinstance(module, ExpertMixture)], _sum_over_ranks)


def _sum_over_ranks(counts: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
