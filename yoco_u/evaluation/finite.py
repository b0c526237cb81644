"""Losses that are numbers: what to say of a model whose loss is not."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from yoco_u.errors import UserError
from yoco_u.inference import RequestOutput
from yoco_u.inference.logprobs import Logprob
from yoco_u.inference.outputs import BROKEN_LOGITS, failed_output


def scored_tokens(requests: Sequence[RequestOutput], model: nn.Module) -> list[list[Logprob]]:
    """The log probabilities of the scored prompt tokens of requests that have finished, in order.

    Raises:
        UserError: if a request ended with an error, or one of them is not finite; see `check_finite`.
    """
    error = next((output.error for request in requests for output in request.outputs if output.error is not None), None)
    if error is not None and (error != BROKEN_LOGITS or non_finite_weight(model) is None):
        raise failed_output(error)
    found = [[one.chosen for one in request.scored] for request in requests]
    check_finite(math.nan if error is not None else [one.logprob for own in found for one in own], model)
    return found


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
