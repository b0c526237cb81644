"""How good a model is: perplexity of held-out text."""

from yoco_u.evaluation.perplexity import Score, score_documents, score_split

__all__ = ["Score", "score_documents", "score_split"]
