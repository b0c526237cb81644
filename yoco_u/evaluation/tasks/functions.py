"""What the YAML files of this folder refer to; the harness imports functions from beside a task alone."""

from yoco_u.evaluation.stdlib_tasks import questions, same_line, texts

__all__ = ["questions", "same_line", "texts"]
