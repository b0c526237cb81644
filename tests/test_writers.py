"""Whatever writes a file is known here, so that a new writer that replaces what is not ours is noticed."""

import ast
import re
import runpy
import sys
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from yoco_u.cli import app

ROOT = Path(__file__).parents[1]
NAMES = {"write_text", "write_bytes", "write_json", "dump_yaml", "replacing", "replacing_folder", "savefig", "save_pretrained"}
"""What writes without a look at what is there. `write_result`, `save_png`, `write_page` and `write_gguf` look first."""

CLAIMED, PART, NEW = "in a folder that is claimed", "in a folder that `check_part` has let pass", "in a new folder"
CHECKED, PROC = "after `check_result`", "not to a disk"
WRITERS = {
    "benchmarks/attention.py": PROC,
    "benchmarks/gpu_phases/profiling.py": CLAIMED,
    "benchmarks/gpu_phases/record.py": CLAIMED,
    "benchmarks/gpu_phases/report.py": CHECKED,
    "benchmarks/harness.py": NEW,
    "benchmarks/kills.py": NEW,
    "benchmarks/serving.py": NEW,
    "recipes/arithmetic.py": CLAIMED,
    "recipes/healing_loops.py": CLAIMED,
    "recipes/judge_again.py": "over a report that it has read",
    "recipes/needle_corpus.py": CHECKED,
    "recipes/talk.py": CLAIMED,
    "recipes/talk_card.py": CHECKED,
    "yoco_u/bench/process.py": NEW,
    "yoco_u/bench/workers/vllm_worker.py": NEW,
    "yoco_u/bench/workers/worker_protocol.py": PROC,
    "yoco_u/checksums.py": PART,
    "yoco_u/config/yaml_text.py": CLAIMED,
    "yoco_u/confined/nursery.py": PROC,
    "yoco_u/conversion/gguf_writer.py": CHECKED,
    "yoco_u/data/index.py": PART,
    "yoco_u/data/prepare.py": PART,
    "yoco_u/data/shards.py": PART,
    "yoco_u/experiment/duration.py": NEW,
    "yoco_u/experiment/jobs.py": CLAIMED,
    "yoco_u/experiment/measure.py": CLAIMED,
    "yoco_u/experiment/run.py": CLAIMED,
    "yoco_u/files.py": "by those that call it",
    "yoco_u/model/configuration.py": "where users of transformers save a config",
    "yoco_u/model/remote_code.py": "where users of transformers save a config",
    "yoco_u/model/saving.py": PART,
    "yoco_u/plotting.py": CHECKED,
    "yoco_u/report/page.py": CHECKED,
    "yoco_u/training/checkpoint.py": PART,
    "yoco_u/training/metrics.py": CLAIMED,
    "yoco_u/training/run_folder.py": CLAIMED,
    "yoco_u/training/trainer.py": CLAIMED,
    "yoco_u/tuning/grpo.py": CLAIMED,
    "yoco_u/tuning/runs.py": CLAIMED,
    "yoco_u/tuning/sft.py": CLAIMED,
}

INPUTS = {
    "model", "models", "runs", "config", "test", "compare", "include_path", "data", "json_schema", "api_key_file",
    "certificate", "key", "kept",
}  # fmt: skip
"""Parameters of commands that are read."""


def writes(code: str) -> bool:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = [*node.args[isinstance(node.func, ast.Name) :], *(keyword.value for keyword in node.keywords)]
            modes = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            opens = name in ("open", "fdopen") and any(re.fullmatch(r"[rbt]*[wax][+bt]*", mode) for mode in modes)
            if opens or name in NAMES:
                return True
    return False


def test_every_writer_is_known() -> None:
    files = [file for folder in ("yoco_u", "recipes", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {file.relative_to(ROOT).as_posix() for file in files if writes(file.read_text(encoding="utf-8"))}
    assert found == WRITERS.keys(), "say above why what is there may be replaced, or use what looks first"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open('a', 'w')", True),
        ("path.open(mode='ab')", True),
        ("path.write_text(a)", True),
        ("open('a')", False),
        ("path.open('rb')", False),
        ("save_png(figure, path)", False),
    ],
)
def test_writers_are_seen(code: str, expected: bool) -> None:
    assert writes(code) == expected


def outputs() -> Iterator[str]:
    """Command and option of each path that a command writes to."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
            if "Path" in repr(hint) and name not in INPUTS:
                yield f"{command.callback.__name__} --{name}"


def test_every_output_of_a_command_is_tried() -> None:
    """By `tests/cli/test_outputs.py`, with what users may have there."""
    tried = ast.parse((ROOT / "tests" / "cli" / "test_outputs.py").read_text(encoding="utf-8"))
    [table] = [node.value for node in tried.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"]
    commands = [[str(part) for part in line] for line in ast.literal_eval(table).values()]
    pairs = [(line[0], option, value) for line in commands for option, value in pairwise(line)]
    assert set(outputs()) == {f"{command} {option}" for command, option, value in pairs if value == "{out}"}


def benchmarks() -> Iterator[Path]:
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        if "parse_args()" in (text := file.read_text(encoding="utf-8")) and "__main__" in text and file.name != "gpu.py":
            yield file


REQUIRED = {
    name: ["x"] for name in ("conversion.py", "gguf_source.py", "hostile.py", "serving.py")
} | {"vllm_plugin.py": ["x", "--python", "x"]}  # fmt: skip


@pytest.mark.parametrize("file", benchmarks(), ids=lambda file: file.name)
def test_benchmarks_leave_what_is_not_theirs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text('{"years": "of work"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(file.parent))
    for out, said in (("mine.json", "was not made by yoco-u"), (".", "is a folder"), ("mine.json/a", "is a file")):
        monkeypatch.setattr(sys, "argv", [file.name, *REQUIRED.get(file.name, []), "--out", out])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(file), run_name="__main__")
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and said in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    assert (tmp_path / "mine.json").read_text() == '{"years": "of work"}'


def test_results_of_benchmarks_may_be_written_again() -> None:
    from yoco_u.files import is_result

    assert [file.name for file in (ROOT / "benchmarks" / "results").iterdir() if not is_result(file)] == []
