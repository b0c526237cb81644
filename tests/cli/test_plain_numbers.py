"""Numbers on the command line are written in the digits 0 to 9, and each loop count once."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from yoco_u.cli import _command

OTHERS = ("٣", "٦٠٠", "१", "௩", "1٣", "٣.5")


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for one in get_args(annotation):
        yield from parts(one)


def is_number(parameter: inspect.Parameter) -> bool:
    found = list(parts(parameter.annotation))
    return int in found or float in found


NUMBERS = [
    (name, parameter.opts[0])
    for name, command in sorted(_command().commands.items())
    for parameter in command.params
    if parameter.name != "help" and is_number(inspect.signature(command.callback).parameters[parameter.name])
]


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_every_option_that_is_a_number(run: Any, command: str, option: str) -> None:
    for text in OTHERS[:5]:
        assert option in run(command, "x", "y", option, text).error


@pytest.mark.parametrize(
    "line",
    [
        ("needles", "RUN", "--lengths", "DIGITS"),
        ("needles", "RUN", "--lengths", "64,DIGITS"),
        ("plan", "--context", "DIGITS"),
        ("plan", "--hardware", "memory=DIGITS,gemm=1e12,bandwidth=1e9"),
        ("bench", "--contexts", "DIGITS"),
        ("evaluate", "RUN", "synthetic:p-hop:documents=DIGITS"),
        ("evaluate", "RUN", "synthetic:p-hop:levels=DIGITS"),
        ("evaluate", "RUN", "synthetic:p-hop:levels=1-DIGITS"),
        ("generate", "RUN", "--prompt", "a", "--num-loops", "DIGITS"),
        ("train", "RUN/config.yaml", "training.steps=DIGITS", "--out", "new"),
    ],
)
@pytest.mark.parametrize("digits", OTHERS[:4])
def test_texts_with_numbers_in_them(run: Any, workspace: Path, tmp_path: Path, line: tuple[str, ...], digits: str) -> None:
    assert run(*(part.replace("RUN", str(workspace / "a")).replace("DIGITS", digits) for part in line)).error


def test_each_loop_count_once(run: Any, workspace: Path) -> None:
    error = run("evaluate", workspace / "a", "--num-loops", "2", "--num-loops", "2").error
    assert error == "--num-loops is 2, 2; expected each value once"
