"""Options that have no effect beside the others: one line that names the option and why, before anything is computed."""

from pathlib import Path
from typing import Any

import pytest

PROMPT = ("--prompt", "a")
NOISE = ("needles", "RUN", "--kinds", "single_1,variable_tracking")
LIKELIEST = "takes the likeliest token every time"


@pytest.mark.parametrize(
    ("line", "option", "why"),
    [
        *(
            (("generate", "RUN", *PROMPT, *greedy), option, LIKELIEST)
            for greedy in (("--greedy",), ("--temperature", "0"))
            for option in (("--top-k", "3"), ("--top-p", "0.9"), ("--min-p", "0.1"), ("--seed", "0"))
        ),
        (("generate", "RUN", *PROMPT, "--greedy"), ("--temperature", "0.7"), LIKELIEST),
        (("chat", "RUN", "--temperature", "0"), ("--seed", "3"), LIKELIEST),
        *(
            (("convert", "RUN", *what, "--out", "OUT"), option, why)
            for what, why in (
                (("--remote-code",), "changes nothing about the model"),
                (("--back",), "changes nothing about the model"),
                (("--gguf",), "changes nothing about the model"),
            )
            for option in (("--kv", "mean"), ("--text", "stdlib"), ("--tokens", "64"))
        ),
        (("convert", "RUN", "--kv", "mean", "--out", "OUT"), ("--tokens", "64"), "--kv mean reads no texts"),
        (("convert", "RUN", "--kv", "mean", "--out", "OUT"), ("--text", "stdlib"), "--kv mean reads no texts"),
        (("evaluate", "RUN"), ("--text-field", "body"), "FILES"),
        (("evaluate", "RUN", "synthetic:s5"), ("--text-field", "body"), "synthetic:s5 is a task"),
        (("evaluate", "RUN", "synthetic:s5"), ("--weights", "int8"), "synthetic:s5 is a task"),
        (("context", "RUN"), ("--text-field", "body"), "--files"),
        (("exits", "RUN"), ("--text-field", "body"), "FILES"),
        (("analyze", "RUN", "--measures", "loss"), ("--queries", "3"), "the measure attention"),
        (("analyze", "RUN", "--measures", "loss"), ("--tolerance", "0.2"), "the measure convergence"),
        (("analyze", "RUN", "--measures", "loss"), ("--exit-threshold", "0.2"), "the measure exits"),
        (("analyze", "RUN"), ("--text-field", "body"), "FILES"),
        (NOISE, ("--haystack", "stdlib"), "kinds that are hidden in a text"),
        (NOISE, ("--text-field", "body"), "kinds that are hidden in a text"),
        (("needles", "RUN"), ("--text-field", "body"), "--haystack"),
        (("tasks", "RUN", "yoco_u_stdlib_choice"), ("--data", "OUT"), "yoco_u_math"),
        (("bench", "--peers", "none"), ("--peer-python", "vllm=python"), "--peers is none"),
        (("bench", "--paper"), ("--peers", "none"), "--paper measures without peers"),
        (("plan", "yoco:size=8m"), ("--size", "100m"), "without a size of its own"),
    ],
)
def test_an_option_without_effect(
    run: Any, workspace: Path, tmp_path: Path, line: tuple[str, ...], option: tuple[str, str], why: str
) -> None:
    places = {"RUN": str(workspace / "a"), "OUT": str(tmp_path / "out")}
    error = run(*(places.get(part, part) for part in (*line, *option))).error
    assert error.startswith(f"{option[0]} has no effect here: ") and why in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [("training.steps=3", "prepare reads the data settings alone"), ("dataset=b", "--out names the folder")],
)
def test_an_override_without_effect(run: Any, workspace: Path, tmp_path: Path, change: str, part: str) -> None:
    assert part in run("prepare", workspace / "config.yaml", change, "--out", tmp_path / "data").error
    assert not (tmp_path / "data").exists()
