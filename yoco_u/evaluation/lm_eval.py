"""lm-evaluation-harness's own command line, with our engine as `--model yoco_u` and our tasks among its own.

    python -m yoco_u.evaluation.lm_eval run --model yoco_u --model_args pretrained=runs/8m,num_loops=3 --tasks piqa

The harness knows a model of another package only once that package is imported, and it has no option that imports one.
Therefore this launcher imports the engine, adds our tasks to those that the harness looks for, and then calls it.
"""

import sys
from typing import Any

from yoco_u.errors import UserError


def main() -> int:
    """Run `lm_eval` with the arguments of this process."""
    try:
        import lm_eval.tasks
        from lm_eval.__main__ import cli_evaluate

        import yoco_u.evaluation.harness  # noqa: F401
        from yoco_u.evaluation.harness_tasks import TASKS
    except ImportError as error:
        print(f"error: {error}; pip install 'yoco-u[evaluation]'", file=sys.stderr)
        return 2

    class WithOurTasks(lm_eval.tasks.TaskManager):
        """Looks into our folder before the user's, which may have tasks of the same names."""

        def __init__(self, verbosity: str | None = None, include_path: Any = None, **settings: Any) -> None:
            theirs = include_path if isinstance(include_path, (list, tuple)) else [include_path] if include_path else []
            super().__init__(verbosity, [TASKS, *theirs], **settings)

    lm_eval.tasks.TaskManager = WithOurTasks
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
