"""Which run a checkpoint is of. Checkpoints are folders, which can be copied into another run, renamed or edited.

When a run begins, an id is drawn for it, which `environment.json` notes and every checkpoint holds. Copies of a run folder have
the same one, and go on. A run that an earlier version began has none, nor have its checkpoints, which are told from others by
what they say of the config alone.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path

from yoco_u.errors import UserError
from yoco_u.training.checkpoint import TrainerState, read_state, step_name
from yoco_u.training.config import RunConfig
from yoco_u.training.run_folder import RunFolder


def run_id(folder: RunFolder, config: RunConfig, saved: Path | None) -> str | None:
    """The id of the run in a folder, a new one if it begins; None if it goes on from a checkpoint that has none.

    Args:
        saved: the checkpoint that the run goes on from, if there is one.

    Raises:
        UserError: if it is not the run's own.
    """
    starts = folder.noted_starts()
    noted = next((start.run for start in starts or () if start.run is not None), None)
    if saved is None:
        return noted or uuid.uuid4().hex
    state = read_state(saved)
    problem = next(_contradictions(saved, state, config), None)
    if problem is None and starts is not None and state.run != noted:
        problem = f"is not of the run that {folder.environment.name} tells of"
    if problem is not None:
        raise UserError(
            f"{saved}: {problem}; move it out of {folder.checkpoints.name}/, and the same command goes on from the checkpoint "
            "before it, or begins again if there is none"
        )
    return state.run


def _contradictions(path: Path, state: TrainerState, config: RunConfig) -> Iterator[str]:
    """What a checkpoint says that no checkpoint of this name and of a run with this config does."""
    training, tokens = config.training, state.step * config.tokens_per_step
    if step_name(state.step) != path.name:
        yield f"is of step {state.step}, which its name does not say"
    if state.step > training.steps:
        yield f"is of step {state.step}, but the run has {training.steps} steps"
    if state.seed != training.seed:
        yield f"is of a run with training.seed = {state.seed}, but this run's is {training.seed}"
    if state.tokens != tokens:
        yield f"has {state.tokens} tokens in {state.step} steps, but this run has {tokens}"
