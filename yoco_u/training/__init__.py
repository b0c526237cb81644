"""Training: from a config and a dataset to a trained model, in one process or in several.

A `RunConfig` and the path of a run folder go into `train`. The folder comes out, with metrics, checkpoints, the exported model
and a summary; a run that was interrupted continues from its newest checkpoint.

Start at `trainer.py`: `train`, then `_Run.run` and `_Run._step`. The way of a batch to an optimizer step leads from there to
`step.py` (backward, update) and `forward.py`. Around it: `parallelize.py` (compilation, recomputation, DDP, FSDP2),
`optimizer.py`, `validation.py`, `checkpoint.py`, `metrics.py`. `run_folder.py` knows the files of a run and reads them for the
other rooms.
"""

from yoco_u.training.config import RunConfig
from yoco_u.training.metrics import read_metrics
from yoco_u.training.run_folder import RunFolderTaken
from yoco_u.training.settings import OptimizerConfig, TrainingConfig
from yoco_u.training.trainer import TrainingDiverged, TrainingInterrupted, train
from yoco_u.training.validation import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "OptimizerConfig",
    "RunConfig",
    "RunFolderTaken",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "evaluate",
    "read_metrics",
    "train",
]
