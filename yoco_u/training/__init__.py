"""Training: the loop, its optimizer and schedule, distributed set-up, checkpoints, metrics."""

from yoco_u.training.config import OptimizerConfig, RunConfig, TrainingConfig
from yoco_u.training.metrics import read_metrics
from yoco_u.training.run_folder import RunFolderTaken
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
