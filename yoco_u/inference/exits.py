"""When a token leaves the loop: by a score of its state, which is small where another loop would hardly change the token.

Scores are measured after each loop but the last. A token leaves where its score is below the threshold of its request, so at
threshold 0 none leaves.

- `angular`: the angular distance between the token's states before and after the loop. It needs no training.
- `divergence` and `gain`: for each loop a linear head, which predicts from the state after it what leaving changes: the KL
  divergence, KL(p_T || p_l), of the next token's distribution after this loop from that after all loops, or how much lower the
  loss of the next token is after all loops. `yoco-u exits` fits the heads.
"""

import os
from math import pi
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.config import Config, Float32, Loops, NonNegativeFloat32, parse
from yoco_u.errors import UserError
from yoco_u.files import DAMAGED, read_json
from yoco_u.loading import weights_digest

FILE = "exits.json"

Score = Literal["angular", "divergence", "gain"]

_ANEW = "remove the file, and fit it anew with yoco-u exits if tokens shall leave the loop"
_LARGEST_LOG = 80.0  # whose exponential is a float32


class Exits(Config):
    """How the tokens of a model leave its loop: the content of `exits.json`.

    Attributes:
        num_loops: T, the most loops that a token runs.
        score: see above.
        threshold: of requests that name none.
        model: what tells the model that heads and threshold are fitted to from others, as of `weights_digest`; empty where
            that is not known.
        heads: of each loop but the last, so many weights as the hidden states are wide, and a constant; empty where the score
            is `angular`. They are applied to states that are divided by their root mean square, and give the logarithm of the
            divergence, or the gain, which counts as 0 where it is below.
    """

    num_loops: Loops
    score: Score
    threshold: NonNegativeFloat32
    model: str = ""
    heads: tuple[tuple[Float32, ...], ...] = ()

    @model_validator(mode="after")
    def _heads_of_loops(self) -> "Exits":
        expected = 0 if self.score == "angular" else self.num_loops - 1
        if len(self.heads) != expected:
            raise ValueError(f"{len(self.heads)} heads came with score {self.score}; expected {expected}")
        return self


def find_exits(folder: Path, a: Architecture) -> Exits | UserError | None:
    """The `exits.json` of a model's folder, or what is wrong with it, as of `load_exits`; None if it has none.

    The file concerns requests alone whose tokens leave the loop, so what is wrong with it is no error of other requests.
    """
    try:
        return load_exits(folder, a) if os.path.lexists(folder / FILE) else None
    except UserError as error:
        return error


def load_exits(folder: Path, a: Architecture) -> Exits:
    """The `exits.json` of a model's folder.

    Raises:
        UserError: if it cannot be read, is damaged, or that of another model, as far as both have checksums.
    """
    path = folder / FILE
    try:
        data = read_json(path, dict[str, Any])
        data.pop("generator", None)
        exits = parse(Exits, data, str(path))
    except UserError as error:
        raise UserError(f"{str(error).removesuffix(f'; {DAMAGED}')}; {_ANEW}") from None
    if exits.model and weights_digest(folder) not in ("", exits.model):
        raise UserError(f"{path}: is fitted to another model, or to this one before it changed; {_ANEW}")
    for head in exits.heads:
        if len(head) != a.hidden_size + 1:
            expected = f"expected {a.hidden_size + 1} for hidden states of {a.hidden_size}"
            raise UserError(f"{path}: a head has {len(head)} numbers; {expected}; {_ANEW}")
    return exits


class ExitRule:
    """Scores the states of tokens.

    Args:
        exits: None for the score `angular`.
    """

    def __init__(self, exits: Exits | None, device: torch.device) -> None:
        self._score: Score = "angular" if exits is None else exits.score
        self._heads = torch.tensor([] if exits is None else exits.heads, device=device)

    def scores(self, loop: int, before: Tensor, after: Tensor) -> Tensor:
        """The scores of some tokens after a loop, (tokens,), none below 0.

        Args:
            loop: which one, from 0.
            before, after: states of the tokens, (tokens, hidden) or (tokens, streams, hidden); of streams the mean counts.
        """
        if self._score == "angular":
            found = angular_distance(before, after)
            return found.mean(-1) if found.ndim > 1 else found
        head = self._heads[loop]
        found = head_inputs(after) @ head[:-1] + head[-1]
        return found.clamp(max=_LARGEST_LOG).exp() if self._score == "divergence" else found.clamp(min=0)


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """The angle between vectors, (..., hidden), divided by pi.

    It is computed as `2 atan2(|x - y|, |x + y|)` of the unit vectors (Kahan, 2006), which is accurate for nearly parallel
    vectors too; arccos of their product is not.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = F.normalize(x.to(dtype), dim=-1), F.normalize(y.to(dtype), dim=-1)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / pi


def head_inputs(states: Tensor) -> Tensor:
    """What heads read, (tokens, hidden), float32: states (tokens, [streams,] hidden) divided by their root mean squares."""
    found = F.rms_norm(states.float(), states.shape[-1:])
    return found.mean(-2) if found.ndim == 3 else found


def check_exits(a: Architecture, exits: Exits | UserError | None) -> Exits | None:
    """Refuse requests whose tokens cannot leave the loop.

    Args:
        a: at the most loops that a token runs.
        exits: as of `find_exits`.

    Returns:
        How tokens leave, where the model's folder says it.

    Raises:
        UserError: as it says.
    """
    if isinstance(exits, UserError):
        raise UserError(f"num_loops is auto, but {exits}", "num_loops")
    if problem := exit_problem(a, exits):
        raise UserError(f"num_loops is auto, but {problem}; give a number of loops", "num_loops")
    return exits


def exit_problem(a: Architecture, exits: Exits | None) -> str:
    """Why tokens cannot leave the loop of a model by these exits; empty if they can.

    Args:
        a: at the most loops that a token runs.
    """
    if (problem := loop_problem(a)) or exits is None or exits.num_loops == a.num_loops:
        return problem
    return (
        f"{FILE} is for {exits.num_loops} loops, and {a.num_loops} run here; set the engine's num_loops to {exits.num_loops}, "
        "or fit it anew with yoco-u exits"
    )


def loop_problem(a: Architecture) -> str:
    """Why tokens cannot leave the loop of a model; empty if they can.

    Args:
        a: at the most loops that a token runs.
    """
    if not a.looped_stages:
        return "the model runs one loop, which no token can leave"
    if len(a.looped_stages) > 1:
        return f"{len(a.looped_stages)} stages of the model loop, and tokens can leave one alone"
    if a.stages[a.looped_stages[0]].attention == "retention":
        return "the model's loop is gated retention, which tokens cannot leave so far"
    return ""
