"""Inside the loops: what each layer and each loop of a model does to the tokens.

A model and batches of tokens go in, numbers come out: each measure is one function here and one module. Most of them watch the
model by hooks, so the model knows nothing of them; where tokens exit and what speculation accepts is measured in the engine.
Start reading at `trace.py`, which has the hooks, and `angular.py`, the simplest measure. `study.py` runs all measures for
`yoco-u analyze`; `tables.py`, `pictures.py` and `output.py` show results. `exits.py`, `scaling.py`: `yoco-u exits`.
"""

from yoco_u.analysis.acceptance import DraftAcceptance, draft_acceptance
from yoco_u.analysis.angular import AngularDistances, angular_distances
from yoco_u.analysis.attention import AttentionSpans, attention_spans
from yoco_u.analysis.classes import TokenClasses, token_classes
from yoco_u.analysis.convergence import Convergence, loops_to_convergence
from yoco_u.analysis.lens import LogitLens, logit_lens
from yoco_u.analysis.loss import LoopLoss, loss_against_loops
from yoco_u.analysis.text import document_batches, split_batches
from yoco_u.analysis.token_loops import ExitLoops, exit_loops
from yoco_u.inference.exits import angular_distance

__all__ = [
    "AngularDistances",
    "AttentionSpans",
    "Convergence",
    "DraftAcceptance",
    "ExitLoops",
    "LogitLens",
    "LoopLoss",
    "TokenClasses",
    "angular_distance",
    "angular_distances",
    "attention_spans",
    "document_batches",
    "draft_acceptance",
    "exit_loops",
    "logit_lens",
    "loops_to_convergence",
    "loss_against_loops",
    "split_batches",
    "token_classes",
]
