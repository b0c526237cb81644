"""The functions that the YAML files of this folder refer to. The harness only imports functions from a file beside a task."""

from yoco_u.evaluation.stdlib_tasks import questions, same_line, texts

__all__ = ["questions", "same_line", "texts"]
