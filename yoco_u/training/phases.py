"""Phases of a run that have a loop count or a window of their own."""

from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field

from yoco_u.config import Config, Count, Loops


class LoopPhase(Config):
    """A part of training with its own loop count.

    Attributes:
        until: share of the steps at which the phase ends. The first phase begins at 0, each further one where the phase before
            it ends; each takes one step at least, and so does what follows the last.
        loops: loop count T of the phase.
    """

    until: float = Field(gt=0, lt=1)
    loops: Loops


class WindowPhase(Config):
    """A part of training with its own window.

    Attributes:
        until: share of the steps at which the phase ends, as of `LoopPhase`.
        window: keys that a token sees in a sliding layer.
    """

    until: float = Field(gt=0, lt=1)
    window: Count


P = TypeVar("P", LoopPhase, WindowPhase)


def phase_ends(phases: Sequence[LoopPhase | WindowPhase], steps: int) -> list[int]:
    """The step of a run of `steps` at which each phase ends.

    Each takes one step at least, and leaves one to each phase after it and to what follows the last.
    """
    ends = [0]
    for latest, phase in enumerate(phases, start=steps - len(phases)):
        ends.append(max(min(round(phase.until * steps), latest), ends[-1] + 1))
    return ends[1:]


def phase_at(phases: Sequence[P], steps: int, step: int) -> P | None:
    """The phase of step `step` of a run of `steps`; None after the last one."""
    return next((phase for phase, end in zip(phases, phase_ends(phases, steps), strict=True) if step < end), None)
