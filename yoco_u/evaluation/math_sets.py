"""Sets of math problems with one answer each, as harness tasks over a folder of the user's own files.

The YOCO-U paper scores its thinking model on eleven sets. Which sets they are was not public when this was written: the eleven
here are assumed, from those that the evaluation of Qwen2.5-Math made usual.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from pydantic import BaseModel

from yoco_u.data.json_lines import read_lines
from yoco_u.errors import UserError, import_optional

MATH_GROUP = "yoco_u_math"
MATH_SETS = (
    "gsm8k", "math", "svamp", "asdiv", "mawps", "carp", "tabmwp", "gaokao2023en", "olympiadbench", "collegemath", "amc23",
)  # fmt: skip
"""Each set is a file `NAME.jsonl` in the folder and a task `yoco_u_math_NAME`; all together are the group `yoco_u_math`."""

_PROMPT = "{{problem}}\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
_NEW_TOKENS = 1024
_BOX, _BRACE = re.compile(r"\\boxed\s*\{"), re.compile(r"[{}]")
_MARKUP = re.compile(r"\$|\\[()\[\]]|\\text\{|\}")
_JOINED = re.compile(r"\s*(?:[,;]|,?\s*\b(?:and|or)\b)\s*(?:[A-Za-z]\w*\s*=\s*)?")


def is_math(name: str) -> bool:
    """Whether a name is that of a math set or of their group."""
    return name in math_names()


def math_names() -> list[str]:
    """The names of the group and of its tasks."""
    return [MATH_GROUP, *(f"{MATH_GROUP}_{name}" for name in MATH_SETS)]


def math_tasks(name: str, folder: Path | None) -> list[dict[str, Any]]:
    """The harness's configurations of one set, or of all sets.

    Args:
        name: one of `math_names`.
        folder: the folder of the files. Each line is an object with `problem` (or `question`) and `answer`. If an answer
            contains `####`, only the part after the last `####` counts.

    Raises:
        UserError: if a file is missing or damaged, or the library that compares answers is not installed.
    """
    import_optional("math_verify", "comparing answers needs math-verify", "evaluation")
    if folder is None:
        raise UserError(f"{name} needs the problems; name a folder of NAME.jsonl files with --data")
    wanted = MATH_SETS if name == MATH_GROUP else [name.removeprefix(f"{MATH_GROUP}_")]
    missing = [f"{one}.jsonl" for one in wanted if not (folder / f"{one}.jsonl").is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; add them, with problem and answer in every line, or name the sets that are "
            f"there, as in {MATH_GROUP}_gsm8k"
        )
    return [_configuration(one, _read(folder / f"{one}.jsonl")) for one in wanted]


def math_group() -> dict[str, Any]:
    """The harness's configuration of the group, without its tasks. In the average every set has the same weight."""
    average = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": False, "filter_list": ["none"]}
    return {"group": MATH_GROUP, "aggregate_metric_list": [average], "metadata": {"version": 1.0}}


def same_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether a text's answer equals the true one in value, as math-verify reads both.

    The text's answer is what it puts into its last `\\boxed{}` (or its last ones, joined as in "1 and 2"), or what it says the
    answer is.
    """
    from math_verify import parse, verify

    truth = parse(f"\\boxed{{{doc['answer']}}}")
    return {"exact_match": float(verify(truth, parse(_with_last_boxes(results[0]))))}


def _with_last_boxes(text: str) -> str:
    """The text without the boxes around what it boxes before its last answer, which math-verify may read as a part of that."""
    boxes = _boxes(text)
    first = len(boxes) - 1
    while first > 0 and _JOINED.fullmatch(_MARKUP.sub("", text[boxes[first - 1][1] : boxes[first][0]])):
        first -= 1
    for start, end in reversed(boxes[: max(first, 0)]):
        text = text[:start] + text[text.index("{", start) + 1 : end - 1] + text[end:]
    return text


def _boxes(text: str) -> list[tuple[int, int]]:
    """Where boxes stand that are in no other one: the first character, and the one behind the closing brace."""
    found, at = list[tuple[int, int]](), 0
    while box := _BOX.search(text, at):
        at, depth = box.end(), 1
        while depth and (brace := _BRACE.search(text, at)):
            at, depth = brace.end(), depth + (1 if brace[0] == "{" else -1)
        if depth:
            break  # the text ends in it
        found.append((box.start(), at))
    return found


def _configuration(name: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "task": f"{MATH_GROUP}_{name}",
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(rows)),
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": _PROMPT,
        "doc_to_target": "{{answer}}",
        "process_results": same_answer,
        "generation_kwargs": {"until": [], "max_gen_toks": _NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


class _Problem(BaseModel):
    problem: str | int | float | None = None
    question: str | int | float | None = None
    answer: str | int | float | None = None


def _read(file: Path) -> list[dict[str, str]]:
    rows = []
    for place, line in read_lines([file], _Problem, "problem and answer"):
        problem = line.question if line.problem is None else line.problem
        if problem is None or line.answer is None:
            raise UserError(f"{place}: expected an object with problem, or question, and answer")
        rows.append({"problem": str(problem), "answer": str(line.answer).split("####")[-1].strip()})
    if not rows:
        raise UserError(f"{file}: there is no problem in it")
    return rows
