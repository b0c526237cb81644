"""Evaluation: how good a model is at predicting text, at using a long context, and at tasks.

A run folder or a saved model and some text go in, scores come out. Each question has its own file to start from:

- `held_out.py`: loss, perplexity and bits per byte at several loop counts, and in 8 or 4 bits; `perplexity.py` computes them,
- `context.py`: the loss of the same tokens behind prefixes of different lengths,
- `needle_grid.py`: whether a model finds facts in long texts, which `needles.py` generates,
- `levels.py`: right answers to generated tasks, by their level,
- `harness.py` and `harness_tasks.py`: the engine as a model of lm-evaluation-harness, and its tasks.

docs/evaluation.md says what each measures.
"""

from yoco_u.evaluation.perplexity import Score, score_documents, score_split

__all__ = ["Score", "score_documents", "score_split"]
