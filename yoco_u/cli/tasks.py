"""`yoco-u tasks`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yoco_u.cli import options
from yoco_u.cli.arguments import check_at_most, check_loops, check_unused, names
from yoco_u.cli.output import print_json
from yoco_u.errors import import_optional

if TYPE_CHECKING:
    from yoco_u.evaluation.harness_tasks import HowToAsk


def tasks(
    model: options.Model,
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASKS", help="Names of tasks, groups or tags, or YAML files; commas will do too.")
    ],
    num_loops: options.LoopCounts = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions of each task, from the first one on. \\[default: all]")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Examples before a question. \\[default: the task's]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens of an answer. \\[default: the task's]")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=1, help="Tokens of context and answer. \\[default: 2048]")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder of task files (YAML) of yours.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of NAME.jsonl files for yoco_u_math.")
    ] = None,
    weights: Annotated[Literal["int8"] | None, typer.Option("--weights", help="int8: compute with int8 weights.")] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"] | None,
        typer.Option("--dtype", metavar="DTYPE", help="To compute in: auto, bfloat16 or float32. \\[default: float32]"),
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask through the tokenizer's chat template.")] = False,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="Agree to run programs that the model writes.")
    ] = False,
    device: options.Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Score a model on tasks of lm-evaluation-harness.

    Besides the harness's own tasks there are yoco_u_paper and
    yoco_u_comparison (the paper's), yoco_u_stdlib (needs no download) and
    yoco_u_math (over files of yours). With several loop counts there is one
    table for each.

    [bold]Examples[/bold]

      yoco-u tasks runs/quickstart/yoco-u yoco_u_stdlib --limit 100

      yoco-u tasks runs/8m hellaswag piqa --num-loops 1 --num-loops 3 --json
    """
    import_optional("lm_eval", "yoco-u tasks needs lm-evaluation-harness", "evaluation")
    from yoco_u.evaluation.harness import EngineLM
    from yoco_u.evaluation.harness_tasks import HowToAsk, load_tasks, run_tasks
    from yoco_u.evaluation.math_sets import MATH_GROUP
    from yoco_u.model.quantization import require_torchao

    check_loops(num_loops or [])
    check_at_most(1000, "examples before a question are few", fewshot=fewshot)
    if weights is not None:
        require_torchao()
    how = HowToAsk(limit, fewshot, max_tokens, chat_template, run_generated_code)
    chosen = names(",".join(tasks)) or ()
    if not any(name.startswith(MATH_GROUP) for name in chosen):
        check_unused(f"it is for {MATH_GROUP}, and no such task is named", data=data)
    loaded = load_tasks(chosen, include_path, data)
    settings: dict[str, Any] = {"max_length": sequence_length, "weights": weights, "dtype": dtype}
    lm = EngineLM(model, device, **{key: value for key, value in settings.items() if value is not None})
    results = []
    for loops in num_loops or [lm.engine.num_loops]:
        lm.num_loops = loops
        results.append({"num_loops": loops} | run_tasks(lm, loaded, how))
        if not json:
            _print_tables(results[-1], how)
    if json:
        from lm_eval.utils import handle_non_serializable

        from yoco_u.formatting import as_json_numbers

        report = {"model": str(model), "tasks": chosen, "results": results}
        print_json(as_json_numbers(report), default=handle_non_serializable)


def _print_tables(results: dict[str, Any], how: "HowToAsk") -> None:
    from lm_eval.utils import make_table

    limit = f", the first {how.limit} questions of each task" if how.limit else ""
    print(f"loops {results['num_loops']}{limit}\n")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    for group, average in results["averages"].items():
        print(f"{group}: {average:.4f} on average\n")
