"""Answers by level: of a stand-in that knows some of them, and of a model against greedy decoding of each question."""

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import architecture, build
from torch import Tensor, nn

from yoco_u.data import DocumentEncoder, train_tokenizer
from yoco_u.data.synthetic import TASKS, document_text, read_entry
from yoco_u.errors import UserError
from yoco_u.evaluation.levels import score_levels

TOKENIZER = train_tokenizer(["a"], 257)


class Knowing(nn.Module):
    """Stands for a model that is sure of each next token of the documents, but knows no more than the first token of answers
    in lines that begin with a letter of its own."""

    device = torch.device("cpu")

    def __init__(self, texts: list[str], unknown: str) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), list[int | None]()
        self.next = {ids[:-1].tobytes(): ids[1:] for ids in DocumentEncoder(TOKENIZER).encode(texts)}
        self.texts = dict(zip(self.next, texts, strict=True))
        self.unknown = unknown

    def forward(self, rows: Tensor, num_loops: int | None, use_cache: bool) -> Any:
        self.calls.append(num_loops)
        logits = torch.zeros(*rows.shape, 257)
        for number, row in enumerate(rows):
            key = row.numpy().astype("uint32").tobytes()
            logits[number, range(rows.shape[1]), self.next[key].tolist()] = 10
            start = 0
            for line in self.texts[key].splitlines(keepends=True):
                end = start + line.rstrip().rfind(";")
                if line[0] in self.unknown:
                    logits[number, end - 1] = logits[number, end - 1].roll(1)
                start += len(line)
        return SimpleNamespace(logits=logits)


def distinct_lines(corpus: Any, level: int, documents: int) -> list[str]:
    texts = [document_text(corpus, level, number, held_out=True) for number in range(documents)]
    return list(dict.fromkeys(line for text in texts for line in text.splitlines() if line))


@pytest.mark.parametrize("task", ["addition", "s5", "assignments", "word-problems-in-steps"])
def test_an_answer_is_right_if_all_its_tokens_are(task: str) -> None:
    corpus = read_entry(f"synthetic:{task}:levels=3-4:length=180")
    texts = [document_text(corpus, level, number, held_out=True) for level in (3, 4) for number in range(40)]
    unknown = "0123abfghABCDEF"
    model = Knowing(texts, unknown)
    done: list[int] = []
    scores = score_levels(model, TOKENIZER, [corpus], 40, 5, done.append)  # type: ignore[arg-type]
    assert [(score.task, score.level) for score in scores] == [(task, 3), (task, 4)]
    assert sum(done) == 2 and set(model.calls) == {5}
    for score in scores:
        documents = next(
            n for n in range(1, 41) if sum(line.count("=") for line in distinct_lines(corpus, score.level, n)) >= 40
        )
        lines = distinct_lines(corpus, score.level, documents)
        assert score.answers == sum(line.count("=") for line in lines)
        wrong = sum(line[0] in unknown for line in lines)  # the last answer of the line
        assert 0 < wrong < len(lines)
        assert score.accuracy == pytest.approx(1 - wrong / score.answers)
        assert score.low < score.accuracy < score.high
        tokens = sum(len(answer) for line in lines for answer in re.findall("=([^;]*);", line))
        assert score.loss == pytest.approx(math.log1p(256 * math.exp(-10)) + 10 * wrong / tokens, rel=1e-4)


def test_questions_that_come_again_do_not_count_again() -> None:
    corpus = read_entry("synthetic:s3:levels=2:length=60")
    texts = [document_text(corpus, 2, number, held_out=True) for number in range(400)]
    [score] = score_levels(Knowing(texts, ""), TOKENIZER, [corpus], 400)  # type: ignore[arg-type]
    lines = [line for text in texts for line in text.split()]
    assert score.answers == len(set(lines)) < len(lines) / 2
    assert score.accuracy == score.high == 1 and 0.98 < score.low < 1


def test_a_level_without_further_questions_ends() -> None:
    model, corpus = build(architecture("yoco", vocab_size=257)), read_entry("synthetic:s3:levels=1:length=60")
    few, all_of_them = (score_levels(model, TOKENIZER, [corpus], answers)[0] for answers in (400, 100_000))
    assert few.answers == all_of_them.answers < 60


def test_a_document_may_have_nothing_new_before_another_one_does() -> None:
    """Documents of one question each, so that it takes more documents than answers."""
    model, corpus = build(architecture("yoco", vocab_size=257)), read_entry("synthetic:s3:levels=1:length=8")
    questions = {document_text(corpus, 1, number, held_out=True) for number in range(300)}
    [score] = score_levels(model, TOKENIZER, [corpus], len(questions))
    assert score.answers == len(questions) > 8


@torch.no_grad()
@pytest.mark.parametrize("num_loops", [None, 1])
def test_a_model_is_right_where_greedy_decoding_is(num_loops: int | None) -> None:
    model = build(architecture(vocab_size=257))
    digits = TOKENIZER.convert_tokens_to_ids(["1", "2", "3"])
    others = [i for i in range(257) if i not in digits]
    model.lm_head.weight[others] = 0
    corpus = read_entry("synthetic:s3:levels=7:length=40")
    [score] = score_levels(model, TOKENIZER, [corpus], 60, num_loops)
    seen, right, documents = set[str](), list[bool](), 0
    while len(right) < 60:
        text = document_text(corpus, 7, documents, held_out=True)
        documents += 1
        start = 0
        for line in text.split():
            if line not in seen:
                seen.add(line)
                prompt = torch.from_numpy(
                    DocumentEncoder(TOKENIZER).encode([text[: start + line.index("=") + 1]])[0].astype(int)
                )
                likeliest = int(model(prompt[None], num_loops=num_loops).logits[0, -1].argmax())
                right.append(TOKENIZER.decode(likeliest) == line[-2])
            start += len(line) + 1
    assert score.answers == len(right)
    assert score.accuracy == pytest.approx(sum(right) / len(right))
    assert 0.1 < score.accuracy < 0.6


def test_other_tokens_than_bytes_are_refused() -> None:
    tokenizer = train_tokenizer(["has more than less "] * 20, 280)
    model = build(architecture(vocab_size=len(tokenizer)))
    with pytest.raises(UserError, match="the model's tokens are not bytes"):
        score_levels(model, tokenizer, [read_entry("synthetic:word-problems:levels=2")], 10)


@pytest.mark.parametrize("answers", [0, -3, 2.5, True])
def test_no_answers_are_refused(answers: Any) -> None:
    with pytest.raises(UserError, match=f"answers is {answers}; expected a whole number of at least 1"):
        score_levels(build(architecture(vocab_size=257)), TOKENIZER, [read_entry("synthetic:s3:levels=2")], answers)


def test_damaged_weights_are_named() -> None:
    model = build(architecture(vocab_size=257))
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match="lm_head"):
        score_levels(model, TOKENIZER, [read_entry("synthetic:s3:levels=2")], 10)


def test_every_task_can_be_scored() -> None:
    model = build(architecture("yoco", vocab_size=257))
    corpora = [read_entry(f"synthetic:{task}:levels=1:length=64") for task in TASKS]
    assert [score.task for score in score_levels(model, TOKENIZER, corpora, 5)] == list(TASKS)
