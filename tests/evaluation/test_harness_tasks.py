"""`yoco-u tasks`: our offline tasks, a user's own, math sets over files, and mistakes of users."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate
import lm_eval.__main__
import lm_eval.evaluator
import lm_eval.tasks
import pytest
from forked import Popen
from harness_models import ours, save_model, theirs
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from yoco_u.cli import main
from yoco_u.errors import UserError
from yoco_u.evaluation import harness_tasks
from yoco_u.evaluation import lm_eval as launcher
from yoco_u.evaluation.harness_tasks import TASKS, HowToAsk, load_tasks, run_tasks
from yoco_u.evaluation.math_sets import MATH_SETS, math_names, math_tasks, same_answer

pytestmark = pytest.mark.usefixtures("small_caches")
STDLIB = ("yoco_u_stdlib_choice", "yoco_u_stdlib_completion", "yoco_u_stdlib_perplexity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "model"
    save_model(path)
    return path


def figures(results: dict[str, Any]) -> dict[str, float]:
    """All metrics and their standard errors."""
    return {
        f"{task} {metric}": value
        for task, found in results["results"].items()
        for metric, value in found.items()
        if isinstance(value, float)
    }


def test_scores_are_those_of_the_path_through_transformers(folder: Path) -> None:
    tasks = load_tasks(["yoco_u_stdlib"])
    assert tasks["tasks"].keys() == set(STDLIB)
    how = HowToAsk(limit=4, fewshot=2, max_tokens=40)
    expected = run_tasks(theirs(folder, add_bos_token=False), tasks, how)
    found = run_tasks(ours(folder, add_bos_token=False), tasks, how)
    assert figures(found) == pytest.approx(figures(expected), rel=1e-6)
    assert found["n-shot"]["yoco_u_stdlib_choice"] == 2 and found["n-samples"]["yoco_u_stdlib_choice"]["effective"] == 4


def test_scores_are_those_of_simple_evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # which is slow
    settings: dict[str, Any] = {"num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 20}, "bootstrap_iters": 1000}
    settings |= {"task_manager": TaskManager(include_defaults=False), "log_samples": True}
    tasks = load_tasks(["yoco_u_stdlib"])
    expected = simple_evaluate(ours(folder), tasks=list(tasks["tasks"].values()), limit=5, **settings)
    how = HowToAsk(limit=5, fewshot=1, max_tokens=20)
    found = run_tasks(ours(folder), load_tasks(["yoco_u_stdlib"]), how, log_samples=True)
    assert expected is not None and figures(found) == figures(expected) and questions(found) == questions(expected)
    for key in ("n-shot", "n-samples", "versions", "higher_is_better"):
        assert found[key] == expected[key]


def questions(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model was asked, with all examples."""
    return {name: [sample["arguments"] for sample in samples] for name, samples in results["samples"].items()}


def test_every_loop_count_gets_the_same_questions(folder: Path, tmp_path: Path) -> None:
    """Of a task that draws examples, and draws its questions anew whenever they are read."""
    (tmp_path / "drawn.yaml").write_text(
        f"include: {TASKS}/stdlib_choice.yaml\ntask: drawn\ntag: null\nprocess_docs: !function drawn.drawn\n"
    )
    (tmp_path / "drawn.py").write_text(
        "import random, numpy\ndef drawn(docs):\n"
        "    return docs.select([5 * i + random.randrange(3) + numpy.random.randint(3) for i in range(9)])\n"
    )
    tasks, lm = load_tasks(["drawn"], include_path=tmp_path), ours(folder, num_loops=1)
    once, again = (questions(run_tasks(lm, tasks, HowToAsk(limit=3, fewshot=1), log_samples=True)) for _ in range(2))
    assert once == again and len(once["drawn"]) == 3


def test_questions_are_right() -> None:
    """The right choice of each question is the line that follows in the standard library."""
    tasks = load_tasks(["yoco_u_stdlib_choice", "yoco_u_stdlib_perplexity"])["tasks"]
    sources = "\n".join(tasks["yoco_u_stdlib_perplexity"].dataset["test"]["text"])
    docs = tasks["yoco_u_stdlib_choice"].dataset["test"]
    assert len(docs) > 200 and len({tuple(row["choices"]) for row in docs}) > 200
    for row in docs:
        assert len(set(row["choices"])) == 4 and row["choices"][row["answer"]] == row["line"]
        assert f"{row['context']}{row['line']}\n" in sources


def test_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tasks", str(folder), "yoco_u_stdlib_choice,yoco_u_stdlib_perplexity", "--limit", "3"]
    loops = ["--num-loops", "1", "--num-loops", "2"]
    assert main([*command, *loops, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["num_loops"] for one in report["results"]] == [1, 2]
    one, two = (figures(found) for found in report["results"])
    assert one.keys() == two.keys() and one != two
    for n, expected in ((1, one), (2, two)):
        lm = ours(folder, num_loops=n)
        assert figures(run_tasks(lm, load_tasks(STDLIB[::2]), HowToAsk(limit=3))) == pytest.approx(expected)
    assert main([*command, "--fewshot", "1"]) == 0
    table = capsys.readouterr().out
    assert "loops 3, the first 3 questions of each task" in table
    assert "|yoco_u_stdlib_choice|" in table.replace(" ", "") and "word_perplexity" in table


def test_a_folder_of_the_users_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{i} + 1 =", "answer": f"{i + 1}"} for i in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"""\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    assert main(["tasks", str(folder), "sums", "--include-path", str(tmp_path), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["results"]
    assert found["n-samples"]["sums"]["effective"] == 10 and found["results"]["sums"]["perplexity,none"] > 1


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems")
    for name in MATH_SETS[:-1]:
        (path / f"{name}.jsonl").write_text(
            '{"problem": "1 + 1?", "answer": "2"}\n\n{"question": "?", "answer": "so #### 3"}\n'
        )
    return path


LEADING_ON = ("and hence b =", "and so b =", "so b=", "and then", "or rather", "and b + 1 =", "android =  2 or so,")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", "0.5", True),
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac12", True),
        ("The answer is 1,234.", "1234", True),
        ("First 3, then 4. The answer is 4.", "3", False),
        (r"It seems to be $\boxed{3}$. No, wait. So the answer is $\boxed{4}$.", "4", True),
        (r"\boxed{5}. Wait, it is \boxed{7}.", "7", True),
        (r"\boxed{7}. Wait, it is \boxed{5}.", "7", False),
        (r"\boxed{5}. Wait, it is \boxed{7}.", "5, 7", False),
        (r"The final answer is $\boxed{\frac{5}{1}}$. Wait, it is \boxed{7}.", "7", True),
        ("\\boxed{5}\n\nTherefore, the final answer is:\n\n\\boxed{7}", "7", True),
        (r"\boxed{3}, \boxed{4}, but \boxed{5} and \boxed{7}.", "5, 7", True),
        (r"$\boxed{5}\text{ or }\boxed{7}$", "5, 7", True),
        (r"$x=\boxed{5}$, $y = \boxed{7}$", "5, 7", True),
        ("$x=\\boxed{5}$ and\n$y = \\boxed{7}$", "7", False),
        *((rf"We get $a=\boxed{{5}}$, {words} \boxed{{7}}.", "7", True) for words in LEADING_ON),
        (r"\boxed{\boxed{7}}, and \boxed{8", "7", True),
        (r"$\boxed{7}$, no: $\boxed{50}$\%", "0.5", True),
        (r"$\boxed{(1, 2)}$", "(1,2)", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("nothing", "4", False),
    ],
)
def test_answers_are_compared_by_value(text: str, answer: str, right: bool) -> None:
    assert same_answer({"answer": answer}, [text]) == {"exact_match": float(right)}


def test_math_sets(folder: Path, problems: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (problems / f"{MATH_SETS[-1]}.jsonl").write_text('{"problem": "?", "answer": "7"}\n')
    command = ["tasks", str(folder), "yoco_u_math", "--data", str(problems), "--max-tokens", "8", "--json"]
    lm = type(ours(folder))
    monkeypatch.setattr(lm, "generate_until", lambda self, asked: [r"it is \boxed{2}" for _ in asked])
    assert main(command) == 0
    [found] = json.loads(capsys.readouterr().out)["results"]
    group = found["groups"]["yoco_u_math"]
    assert group["exact_match,none"] == pytest.approx(10 * 0.5 / 11)  # every set has the same weight
    assert len(MATH_SETS) == 11 and len(found["n-samples"]) == 11


def test_mistakes(folder: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(["tasks", str(folder), *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        return shown.err

    (problems / f"{MATH_SETS[-1]}.jsonl").unlink(missing_ok=True)
    assert "no such folder" in error("yoco_u_math", "--data", str(tmp_path / "none"))
    assert f"lacks {MATH_SETS[-1]}.jsonl" in error("yoco_u_math", "--data", str(problems))
    assert "name a folder of NAME.jsonl files with --data" in error("yoco_u_math_gsm8k")
    (tmp_path / "gsm8k.jsonl").write_text('{"problem": "?"}\n')
    assert "gsm8k.jsonl, line 1: expected an object with problem" in error("yoco_u_math_gsm8k", "--data", str(tmp_path))
    for content in (b'{"problem": "\xff", "answer": "1"}', b"[" * 100_000, b'{"problem": "\\ud800", "answer": "1"}', b"[1]"):
        (tmp_path / "gsm8k.jsonl").write_bytes(content + b"\n")
        assert "gsm8k.jsonl, line 1: " in error("yoco_u_math_gsm8k", "--data", str(tmp_path))
    (tmp_path / "gsm8k.jsonl").write_text('{"problem": "1\u20281\x85", "answer": 2}\n')
    [task] = math_tasks("yoco_u_math_gsm8k", tmp_path)
    assert task["custom_dataset"]()["test"]["problem"] == ["1\u20281\x85"]
    assert "no such folder" in error("yoco_u_stdlib", "--include-path", str(tmp_path / "none"))
    assert "no chat template" in error("yoco_u_stdlib_choice", "--limit", "1", "--chat-template")
    assert "Missing argument 'TASKS'" in error("--fewshot", "3")
    assert "'int4' is not one of 'auto', 'bfloat16', 'float32'" in error("yoco_u_stdlib", "--dtype", "int4")


def test_data_that_is_not_here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "away.yaml").write_text(
        "task: away\ndataset_path: nobody/nothing\noutput_type: loglikelihood\ntest_split: test\n"
    )

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (LocalEntryNotFoundError)\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        load_tasks(["away"], include_path=tmp_path)
    assert str(caught.value).startswith("away: its data cannot be loaded (Couldn't reach 'nobody/nothing' on the Hub")
    assert "\n" not in str(caught.value)


def test_programs_run_with_leave_alone(folder: Path) -> None:
    tasks = load_tasks(["yoco_u_stdlib_choice"])
    tasks["tasks"]["yoco_u_stdlib_choice"].UNSAFE_CODE = True
    with pytest.raises(UserError, match=r"yoco_u_stdlib_choice runs programs .* --run-generated-code"):
        run_tasks(ours(folder), tasks, HowToAsk(limit=1))
    assert run_tasks(ours(folder), tasks, HowToAsk(limit=1, run_generated_code=True))["results"]


@pytest.mark.parametrize(
    ("how", "change", "part"),
    [
        (HowToAsk(max_tokens=2048), {}, "asks for 2048 new tokens"),
        (HowToAsk(fewshot=65), {}, "with 65 examples before it"),
        (HowToAsk(fewshot=10**18), {}, "examples before it"),
        (HowToAsk(), {"temperature": -1.0, "do_sample": True}, "temperature"),
        (HowToAsk(), {"beams": 4}, "generation_kwargs has beams"),
        (HowToAsk(), {"until": 3}, "stop"),
    ],
)
def test_nothing_is_scored_before_all_settings_fit(folder: Path, how: HowToAsk, change: dict[str, Any], part: str) -> None:
    """The task that cannot be asked is the last one, and generates, which the harness does after all scoring."""
    lm, tasks = ours(folder), load_tasks(["yoco_u_stdlib_perplexity", "yoco_u_stdlib_completion"])
    tasks["tasks"]["yoco_u_stdlib_completion"].set_config("generation_kwargs", change, update=True)
    lm.engine.step = None  # type: ignore[method-assign,assignment]  # so that nothing can run
    with pytest.raises(UserError, match=f"^yoco_u_stdlib_[a-z]+: .*({part})"):
        run_tasks(lm, tasks, how)


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "TaskManager", partial(TaskManager, include_defaults=False))  # those are slow to read
    with pytest.raises(UserError, match="yoco_u_papr: no task or group of this name; did you mean yoco_u_paper"):
        load_tasks(["yoco_u_papr"])
    with pytest.raises(UserError, match=r"yoco_u_math_gsm9k: .* did you mean yoco_u_math_gsm8k"):
        load_tasks(["yoco_u_math_gsm9k"])
    with pytest.raises(UserError, match="zzz: no task or group of this name; `lm_eval ls tasks` lists them"):
        load_tasks(["zzz"])


FOLDERS = [
    "arc",
    "winogrande",
    "hellaswag",
    "mmlu",
    "bbh",
    "gsm8k",
    "humaneval",
    "drop",
    "wikitext",
    "lambada",
    "piqa",
    "openbookqa",
]


EXAMPLES = {
    "paper": {"arc_challenge": 25, "winogrande": 5, "hellaswag": 10, "gsm8k": 5, "humaneval": 0, "drop": 3},
    "comparison": {},
}


class TaskWithoutData(ConfigurableTask):
    """The task that the harness makes of a configuration, without loading its data."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.given = config

    @property
    def task_name(self) -> str:
        return str(self.given["task"])


@pytest.mark.parametrize(("file", "tasks"), [("paper", 6 + 57 + 27), ("comparison", 8)])
def test_groups_of_the_paper(file: str, tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of our groups exist in the harness, with the examples and the metrics that the group files name."""
    monkeypatch.setattr(lm_eval.tasks._factory, "ConfigurableTask", TaskWithoutData)
    monkeypatch.setattr(evaluate, "load", lambda *_: SimpleNamespace(compute=lambda **_: None))
    folders = [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in FOLDERS]
    loaded = TaskManager(include_path=[*folders, str(TASKS)], include_defaults=False).load([f"yoco_u_{file}"])
    configs = {name: task.given for name, task in loaded["tasks"].items()}
    assert len(configs) == tasks
    for name, config in configs.items():
        expected = {"mmlu": 5, "bbh_": 3}.get(name[:4]) or EXAMPLES[file].get(name)
        assert config.get("num_fewshot") == expected, name
    group = loaded["groups"][f"yoco_u_{file}"]
    assert group.metadata["average"].keys() == set(group.child_names) - {"wikitext"}
    for name, chosen in group.metadata["average"].items():
        metric, filtered = chosen.split(",")
        known = configs[name]["metric_list"] if name in configs else loaded["groups"][name]._config.aggregate_metric_list
        metrics = [one["metric"] if isinstance(one, dict) else one.metric for one in known]
        assert metric in metrics or callable(metrics[0])  # a function of the task
        assert filtered == "none" or filtered in str(configs.get(name, known))


def test_names_of_math_sets() -> None:
    assert len(math_names()) == 12 and len(set(math_names())) == 12


@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        (["run", "--model", "yoco_u", "--tasks", "yoco_u_paper"], []),
        (["run", "--tasks=yoco_u_paper", "--include_path={}"], ["{}"]),
        (["run", "--config", "{}/run.yaml"], []),
        (["validate", "--tasks=yoco_u_paper", "--include_path", "{}"], ["{}"]),
        (["ls", "tasks"], []),
    ],
    ids=" ".join,
)
def test_the_harness_s_own_command_line(
    arguments: list[str], theirs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("model: yoco_u\ntasks: [yoco_u_paper]\n")
    searched = []

    class Searches:
        def __init__(self, verbosity: str | None = None, include_path: Any = None, **settings: Any) -> None:
            searched.extend(str(path) for path in include_path)
            raise UserError("seen")

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Searches)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *(part.format(tmp_path) for part in arguments)])
    assert launcher.main() == 2
    assert searched == [str(TASKS), *(path.format(tmp_path) for path in theirs)]


def test_an_error_of_the_harness_s_own_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("no such folder")

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", TaskManager)
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", fail)
    assert launcher.main() == 2
    assert capsys.readouterr().err == "error: no such folder\n"


def test_the_launcher_makes_the_model_known(tmp_path: Path) -> None:
    """In a process that has not imported what makes it known."""
    (tmp_path / "launch.py").write_text(
        "import sys; assert 'yoco_u.evaluation.harness' not in sys.modules\n"
        "import lm_eval.__main__, yoco_u.evaluation.lm_eval as launcher; from lm_eval.api.registry import get_model\n"
        "lm_eval.__main__.cli_evaluate = lambda: print(get_model('yoco_u'))\n"
        "launcher.main()\n"
    )
    process = Popen([sys.executable, str(tmp_path / "launch.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and "EngineLM" in process.stdout.read()
    assert process.wait() == 0


def test_without_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["tasks", str(folder), "yoco_u_stdlib"]) == 2
    assert capsys.readouterr().err == "error: yoco-u tasks needs lm-evaluation-harness: pip install 'yoco-u[evaluation]'\n"
