"""The part of `yoco-u evaluate` that runs tasks of lm-evaluation-harness."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoco_u.errors import UserError

if TYPE_CHECKING:
    from yoco_u.evaluation.harness_tasks import HowToAsk


def evaluate_on_tasks(
    model: Path,
    names: tuple[str, ...],
    num_loops: list[int] | None,
    how: dict[str, Any],
    settings: dict[str, Any],
    as_json: bool,
    include_path: Path | None = None,
    data: Path | None = None,
) -> None:
    """Score a model on tasks at each loop count; print the harness's tables, or everything as JSON.

    Args:
        how: fields of `HowToAsk`.
        settings: of `EngineLM`; those that are None keep its defaults.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("--tasks needs lm-evaluation-harness; pip install 'yoco-u[evaluation]'") from None
    from yoco_u.evaluation.harness import EngineLM
    from yoco_u.evaluation.harness_tasks import HowToAsk, load_tasks, run_tasks

    asked = HowToAsk(**how)
    tasks = load_tasks(names, include_path, data)
    lm = EngineLM(model, **{key: value for key, value in settings.items() if value is not None})
    found = []
    for loops in num_loops or [lm.engine.num_loops]:
        lm.num_loops = loops
        found.append({"num_loops": loops} | run_tasks(lm, tasks, asked))
        if not as_json:
            _print_tables(found[-1], asked)
    if as_json:
        from lm_eval.utils import handle_non_serializable

        report = {"model": str(model), "tasks": names, "results": found}
        print(json.dumps(report, indent=2, ensure_ascii=False, default=handle_non_serializable))


def _print_tables(results: dict[str, Any], how: "HowToAsk") -> None:
    from lm_eval.utils import make_table

    limit = f", the first {how.limit} questions of each task" if how.limit else ""
    print(f"loops {results['num_loops']}{limit}\n")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    for group, average in results["averages"].items():
        print(f"{group}: {average:.4f} on average\n")
