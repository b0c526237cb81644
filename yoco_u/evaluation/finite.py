"""Losses that are numbers: what to say of a model whose loss is not."""

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from yoco_u.errors import UserError


def check_finite(losses: ArrayLike, model: nn.Module) -> None:
    """Check the losses of a model.

    Raises:
        UserError: if one of them is NaN or infinite; it names the first weight that is not finite either, if there is one.
    """
    if np.isfinite(losses).all():
        return
    damaged = non_finite_weight(model)
    if damaged is None:
        raise UserError("the loss is not finite, though all weights are: the logits overflow; the model is of no use like this")
    raise UserError(f"the loss is not finite, as {damaged} holds NaN or infinity; take another checkpoint, or train again")


def non_finite_weight(model: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity; None if there is none."""
    return next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
