"""Inside the loops: what each loop of a model does, measured from outside by hooks; the model knows nothing of it."""

from yoco_u.analysis.angular import AngularDistances, angular_distance, angular_distances
from yoco_u.analysis.attention import AttentionSpans, attention_spans
from yoco_u.analysis.classes import TokenClasses, token_classes
from yoco_u.analysis.convergence import Convergence, loops_to_convergence
from yoco_u.analysis.lens import LogitLens, logit_lens
from yoco_u.analysis.loss import LoopLoss, loss_against_loops
from yoco_u.analysis.text import document_batches, split_batches

__all__ = [
    "AngularDistances",
    "AttentionSpans",
    "Convergence",
    "LogitLens",
    "LoopLoss",
    "TokenClasses",
    "angular_distance",
    "angular_distances",
    "attention_spans",
    "document_batches",
    "logit_lens",
    "loops_to_convergence",
    "loss_against_loops",
    "split_batches",
    "token_classes",
]
