"""A talk in the terminal: what is said, what the model reads, what settings do."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from yoco_u.checksums import SUMS
from yoco_u.cli.chat import Conversation
from yoco_u.inference import LLM, SamplingParams
from yoco_u.loading import load_model


@pytest.fixture
def talk(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*lines: str) -> Any:
        said = iter(lines)

        def read(_: str) -> str:
            try:
                return next(said)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        return run("chat", workspace / "a", "--temperature", "0", "--max-tokens", "6", "--dtype", "float32")

    return call


@cache
def answers(folder: Path, *texts: str, **settings: Any) -> list[str]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 6} | settings)
    return [request.outputs[0].text for request in LLM(folder, dtype="float32").generate(list(texts), params)]


def test_the_text_grows_with_what_both_write(talk: Any, workspace: Path) -> None:
    [first] = answers(workspace / "a", "one")
    [second] = answers(workspace / "a", f"one{first}two", num_loops=3)
    [third] = answers(workspace / "a", "three", num_loops=3, max_tokens=2)
    outcome = talk("one", "/loops 3", "two", "/reset", "/tokens 2", "three")
    assert outcome.status == 0
    assert outcome.out == f"{first}\n{second}\n{third}\n\n"
    assert "no chat template" in outcome.err and "loops: 3" in outcome.err and "forgotten" in outcome.err


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/help", "/loops VALUE"),
        ("/abacus 3", "unknown: /abacus\n/loops VALUE"),
        ("/loops", "/loops needs a value\n/loops VALUE"),
        ("/loops 0", "num_loops"),
        ("/tokens x", "max_tokens"),
    ],
)
def test_mistakes_do_not_end_a_talk(talk: Any, workspace: Path, line: str, part: str) -> None:
    outcome = talk(line, "", "one")
    assert outcome.status == 0
    assert outcome.out == answers(workspace / "a", "one")[0] + "\n\n"
    assert part in outcome.err.split("Ctrl-D ends", 1)[1]


def test_exit_ends_a_talk(talk: Any, workspace: Path) -> None:
    outcome = talk("one", "/exit", "two")
    assert (outcome.status, outcome.out) == (0, answers(workspace / "a", "one")[0] + "\n")


def test_a_question_that_cannot_be_answered_is_taken_back(talk: Any, workspace: Path) -> None:
    """The next one is asked as if it had not been."""
    first, last = talk("one", "two"), talk("one", "/loops auto", "not this", "/loops 2", "two")
    assert last.out == first.out and "num_loops is auto, but" in last.err


def test_what_could_not_be_answered_is_not_part_of_the_talk(talk: Any, workspace: Path) -> None:
    [first] = answers(workspace / "a", "one")
    [second] = answers(workspace / "a", f"one{first}two")
    outcome = talk("one", "/tokens 1000000", "too long", "/tokens 6", "two")
    assert outcome.status == 0
    assert outcome.out == f"{first}\n{second}\n\n"
    assert "more than max_model_len" in outcome.err


def test_ctrl_c_stops_an_answer(talk: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LLM.stream

    def stopped(self: LLM, *arguments: Any) -> Any:
        updates = whole(self, *arguments)
        yield next(updates)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", stopped)
    outcome = talk("one", "two")
    assert outcome.status == 0
    assert len(outcome.out.splitlines()) >= 2


def test_a_chat_template_is_used(workspace: Path) -> None:
    import torch

    _, tokenizer = load_model(workspace / "a", torch.device("cpu"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
    said = Conversation(tokenizer)
    said.add("x", "y")
    assert tokenizer.decode(said.ask("z")) == "u:x;a:y;u:z;a:"


def test_a_broken_chat_template_is_refused_before_the_talk(run: Any, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "a" / "model", tmp_path / "model")
    (tmp_path / "model" / SUMS).unlink()
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}\n{% if %}")
    error = run("chat", tmp_path / "model").error
    assert error.startswith(f"{tmp_path}/model/chat_template.jinja: this model's chat template is broken (line 2: ")
