"""lm-evaluation-harness's own command line, with our engine as `--model yoco_u` and our tasks among its own.

    python -m yoco_u.evaluation.lm_eval run --model yoco_u --model_args pretrained=runs/8m,num_loops=3 --tasks piqa

The harness knows a model of another package only once that package is imported, and it has no option that imports one.
Therefore this launcher imports the engine and then calls the harness.
"""

import sys

from yoco_u.errors import UserError


def main() -> int:
    """Run `lm_eval` with the arguments of this process."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import yoco_u.evaluation.harness  # noqa: F401
        from yoco_u.evaluation.harness_tasks import TASKS
    except ImportError as error:
        print(f"error: {error}; pip install 'yoco-u[evaluation]'", file=sys.stderr)
        return 2
    names_tasks = not {"ls", "validate", "--tasks", "-t"}.isdisjoint(sys.argv)
    if names_tasks and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
