"""Tasks of lm-evaluation-harness, loaded by name and run: the harness's own, ours, and those of a user's folder."""

import contextlib
import io
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from yoco_u.config import did_you_mean
from yoco_u.errors import UserError, first_line
from yoco_u.evaluation.harness import EngineLM
from yoco_u.evaluation.math_sets import MATH_GROUP, is_math, math_group, math_names, math_tasks

TASKS = Path(__file__).with_name("tasks")
"""The folder of our tasks and groups, which the harness takes as `--include_path`."""

_OFFLINE_TAG = "yoco_u_stdlib"
_BOOTSTRAPS = 1000  # draws for the standard errors of metrics that have no formula for them


@dataclass(frozen=True)
class HowToAsk:
    """How the questions of tasks are asked. None leaves a setting to the task.

    Attributes:
        limit: number of questions of each task, from the first one on; None for all.
        fewshot: number of examples before each question. Tasks that set it to 0 themselves keep 0.
        max_tokens: the most tokens of a generated answer.
        chat_template: whether questions go through the tokenizer's chat template.
        run_generated_code: whether tasks may run programs that the model wrote.
    """

    limit: int | None = None
    fewshot: int | None = None
    max_tokens: int | None = None
    chat_template: bool = False
    run_generated_code: bool = False


def load_tasks(names: Sequence[str], include_path: Path | None = None, data: Path | None = None) -> dict[str, Any]:
    """Load tasks and groups, with their data.

    Args:
        names: names of tasks, groups or tags, or YAML files.
        include_path: a folder with task files of the user's own.
        data: the folder with the files of the math sets.

    Returns:
        What `lm_eval.evaluate` takes: `tasks` and `groups` by name.

    Raises:
        UserError: for an unknown name, with the nearest known ones, and if a task's data or a package that it needs is missing.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for option, folder, content in (("include-path", include_path, "task files (YAML)"), ("data", data, "NAME.jsonl files")):
        if folder is not None and not folder.is_dir():
            raise UserError(f"--{option} {folder}: no such folder; give one of {content}")
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle their questions while they are loaded
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = _manager([name for name in names if not is_math(name)], include_path)
    found: list[Any] = []
    for name in names:
        if is_math(name):
            found += _math(manager, name, data)
            continue
        if name not in manager.all_tasks and not Path(name).is_file():
            hint = did_you_mean(name, [*manager.all_tasks, *math_names()], "`lm_eval ls tasks` lists them", most=3)
            raise UserError(f"{name}: no task or group of this name; {hint}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # data sets, the hub and the tasks' own code raise nearly anything
            raise _cannot_load(name, error) from None
        group = loaded.get("groups", {}).get(name)
        found += loaded["tasks"].values() if group is None else [group]
    try:
        together: dict[str, Any] = manager.load(found)
    except ValueError as error:  # two of the groups contain the same task
        raise UserError(f"{error}; run them one after another") from None
    return together


def run_tasks(lm: LM, tasks: dict[str, Any], how: HowToAsk, log_samples: bool = False) -> dict[str, Any]:
    """Score a model on tasks, as `lm_eval.simple_evaluate` does, but without its slow report on the machine's environment.

    Args:
        lm: the model.
        tasks: what `load_tasks` returned.
        how: how the questions are asked.
        log_samples: whether to report every question and answer as well.

    Returns:
        What the harness reports (`results`, `groups`, `n-shot`, ...), and `averages`, the average score of each group whose
        file says which metric of each task counts.

    Raises:
        UserError: before the first question is asked, if the tokenizer lacks the chat template, a task runs programs and the
            user has not agreed to that, or the first question of any task cannot be asked so.
    """
    if how.chat_template and not lm.tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; leave out --chat-template")
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not how.run_generated_code:
            raise UserError(f"{name} runs programs that the model writes; add --run-generated-code to agree to that")
        _ask(task, how)
    with _draws(tasks["tasks"].values()):
        for name, task in tasks["tasks"].items():
            _check(lm, name, task, how)
    # The harness prints progress to stdout, which is for results.
    with _draws(tasks["tasks"].values()), contextlib.redirect_stdout(sys.stderr):
        results: dict[str, Any] = evaluate(
            lm,
            tasks,
            limit=how.limit,
            apply_chat_template=how.chat_template,
            fewshot_as_multiturn=how.chat_template,
            confirm_run_unsafe_code=how.run_generated_code,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=log_samples,
        )
    results["averages"] = {
        name: _average(group.metadata["average"], results)
        for name, group in tasks.get("groups", {}).items()
        if "average" in (group.metadata or {})
    }
    return results


def _ask(task: Any, how: HowToAsk) -> None:
    """Change a task's own settings to those of `how`."""
    own = task.get_config("num_fewshot")
    task.set_config("num_fewshot", own or 0 if how.fewshot is None or own == 0 else how.fewshot)
    if how.max_tokens is not None and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": how.max_tokens}, update=True)


@contextlib.contextmanager
def _draws(tasks: Iterable[Any]) -> Iterator[None]:
    """Let tasks draw the same whenever this is entered: examples as in `lm_eval.simple_evaluate`, the rest as in any call."""
    for task in tasks:
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _check(lm: LM, name: str, task: Any, how: HowToAsk) -> None:
    """Make the first question of a task, and check that the model could answer it."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            task.build_all_requests(
                limit=1,
                apply_chat_template=how.chat_template,
                fewshot_as_multiturn=how.chat_template,
                chat_template=lm.apply_chat_template if how.chat_template else None,
            )
        if isinstance(lm, EngineLM):
            lm.check(task.instances)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # the tasks' own code and templates raise nearly anything
        examples = task.get_config("num_fewshot")
        raise UserError(
            f"{name}: its first question, with {examples} examples before it, cannot be made ({first_line(error)}); change "
            "--fewshot or the task, or leave it out"
        ) from None


def _average(metrics: dict[str, str], results: dict[str, Any]) -> float:
    scores = results["results"] | results.get("groups", {})
    return float(sum(scores[task][metric] for task, metric in metrics.items()) / len(metrics))


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """A task manager that knows our tasks and the user's, and the harness's own only if a name asks for one.

    The harness has thousands of tasks, and reading them takes a while.
    """
    paths = [str(path) for path in (TASKS, include_path) if path is not None]
    ours = TaskManager(include_path=paths, include_defaults=False)
    alone = {*ours.all_subtasks, _OFFLINE_TAG}
    if all(name in alone or Path(name).is_file() for name in names):
        return ours
    return TaskManager(include_path=paths)


def _math(manager: Any, name: str, data: Path | None) -> list[Any]:
    configurations = math_tasks(name, data)
    tasks = [task for one in configurations for task in manager.load([one])["tasks"].values()]
    if name != MATH_GROUP:
        return tasks
    group = Group.from_config(math_group())
    for task in tasks:
        group.add(task)
    return [group]


def _cannot_load(name: str, error: Exception) -> UserError:
    reason = first_line(error)
    if isinstance(error, ImportError):
        return UserError(f"{name} needs a package that is not installed ({reason}); install it")
    return UserError(
        f"{name}: its data cannot be loaded ({reason}); load it once with a connection to the Hugging Face hub, or leave it out"
    )
