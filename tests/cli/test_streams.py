"""Standard input and output as users have them: closed, of another encoding, read by `head`; and our own mistakes."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from yoco_u.cli import main

PLAN = ["plan", "yoco_u:size=test", "--context", "64"]


class Bytes(io.TextIOWrapper):
    """A stream of some bytes in an encoding."""

    def __init__(self, content: bytes = b"", encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(content), encoding)


@pytest.mark.parametrize(
    ("stdin", "part"),
    [(None, "no standard input"), (Bytes(b"caf\xe9"), "not UTF-8"), (Bytes(), "prompt is empty")],
    ids=["closed", "latin-1", "empty"],
)  # fmt: skip
def test_a_prompt_that_cannot_be_read(
    run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, stdin: Any, part: str
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert part in run("generate", workspace / "a", "--prompt", "-").error


@pytest.mark.parametrize("stdin", [None, Bytes(b"caf\xe9\n/loops \xff\n/loops 1\n")], ids=["closed", "latin-1"])
def test_a_chat_that_cannot_be_read(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    outcome = run("chat", workspace / "a")
    assert outcome.status == 0 and ("write it again" in outcome.err) == (stdin is not None)


@pytest.mark.parametrize(
    ("given", "part"),
    [("\udcff", "is not UTF-8 text"), ("a\0b", "is not UTF-8 text"), ("", "--prompt is empty")],
    ids=["bytes", "NUL", "empty"],
)  # fmt: skip
def test_arguments_that_no_text_is_in(run: Any, given: str, part: str) -> None:
    assert part in run("generate", "run", "--prompt", given).error


@pytest.mark.parametrize("kept", [True, False])
def test_output_that_nobody_reads_any_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    """Whether a stream keeps what it could not write, and fails on it again, or has forgotten it."""
    for line in (PLAN, ["--help"], ["experiment", "--help"], ["trian"]):
        reading, writing = os.pipe()
        os.close(reading)
        binary = os.fdopen(writing, "wb", -1 if kept else 0)
        with monkeypatch.context() as patch, io.TextIOWrapper(binary, write_through=not kept) as closed:
            patch.setattr(sys, "stdout", closed)
            assert main(line) == (2 if line == ["trian"] else 141)
        assert len(capsys.readouterr().err.splitlines()) == (line == ["trian"])


def test_output_in_an_encoding_without_the_characters(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Bytes(encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["report", str(workspace / "a"), "--out", str(tmp_path / "täglich.html")]) == 0
    assert "t\\xe4glich.html" in shown.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_no_output_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(PLAN) == 0


@pytest.mark.parametrize("error", [EOFError("cut"), RuntimeError("wrong"), ValueError("wrong"), BrokenPipeError()])
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("yoco_u.planning.plan.make_plan", fail)
    with pytest.raises(type(error)):
        main(PLAN)


def test_an_interrupt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("yoco_u.planning.plan.make_plan", interrupt)
    outcome = run(*PLAN)
    assert outcome.status == 130 and outcome.err == "\ninterrupted\n"
