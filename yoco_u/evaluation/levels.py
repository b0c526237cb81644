"""Right answers of a model to generated tasks, level by level, on instances that no training has."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from transformers import PreTrainedTokenizerFast

from yoco_u.config import Config, shown
from yoco_u.data import DocumentEncoder
from yoco_u.data.synthetic import BEGIN, END, SyntheticCorpus, document_text
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import check_finite
from yoco_u.model import YocoUForCausalLM

ANSWERS = 500
"""Answers of each level by default: 95% intervals of at most 0.088."""

MOST_ANSWERS = 100_000
"""Answers of each level at most: 95% intervals of at most 0.0062, below which nobody tells models apart."""

_DOCUMENTS_PER_PASS = 64
_MOST_WITHOUT_NEW = 500  # documents in a row, after which a level counts as exhausted
_ANSWER = re.compile(f"{BEGIN}([^{END}]*){END}")

_Spans = list[tuple[int, int]]
"""Where answers stand in a text: the first character, and the one behind the last."""


class LevelScore(Config):
    """The answers of a model to questions of one level of one task.

    Attributes:
        answers: number of questions. No question comes twice, so there are fewer where a level has few instances.
        accuracy: share of right answers. An answer is right if greedy decoding would write it, all tokens of it.
        low, high: 95% confidence interval of the accuracy (Wilson's).
        loss: nats per token of the right answers.
    """

    task: str
    level: int
    answers: int
    accuracy: float
    low: float
    high: float
    loss: float


@torch.no_grad()
def score_levels(
    model: YocoUForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpora: Sequence[SyntheticCorpus],
    answers: int = ANSWERS,
    num_loops: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[LevelScore]:
    """Ask a model for the answers to each level of generated tasks.

    Documents have as many instances as in training, all of the same level. One pass over a document scores all its answers:
    if each token of an answer is the likeliest one behind the right tokens before it, greedy decoding gives this answer.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer, whose tokens are bytes.
        corpora: which tasks, levels and lengths of documents.
        answers: how many answers of each level to score at least, if it has so many.
        num_loops: loop count T; the model's own by default.
        advance: called with 1 after each level.

    Raises:
        UserError: if `answers` is no whole number from 1 to 100,000, the tokens are not bytes, or a loss is not finite.
    """
    if isinstance(answers, bool) or not isinstance(answers, int) or answers < 1:
        raise UserError(f"answers is {shown(answers)}; expected a whole number of at least 1")
    if answers > MOST_ANSWERS:
        raise UserError(f"answers is {shown(answers)}; expected at most {MOST_ANSWERS:,}, with which a share is known to 0.3%")
    encoder, found = DocumentEncoder(tokenizer), []
    for corpus in corpora:
        for level in corpus.all_levels:
            found.append(_score(model, encoder, corpus, level, answers, num_loops))
            advance(1)
    return found


def _score(
    model: YocoUForCausalLM, encoder: DocumentEncoder, corpus: SyntheticCorpus, level: int, answers: int, num_loops: int | None
) -> LevelScore:
    right, nats, tokens = list[bool](), 0.0, 0
    for batch in _batches(corpus, level, answers):
        ids = np.stack([*_encoded(encoder, [text for text, _ in batch])])
        rows = torch.from_numpy(ids.astype(np.int64)).to(model.device)  # (documents, length)
        logits = model(rows[:, :-1], num_loops=num_loops, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1).cpu()
        likeliest = (logits.argmax(-1) == rows[:, 1:]).cpu()  # at i, of character i of the text
        for row, (_, spans) in enumerate(batch):
            for start, end in spans:
                right.append(bool(likeliest[row, start:end].all()))
                nats += float(losses[row, start:end].sum())
                tokens += end - start
    check_finite(nats, model)
    accuracy, (low, high) = sum(right) / len(right), binomtest(sum(right), len(right)).proportion_ci(0.95, "wilson")
    return LevelScore(
        task=corpus.task,
        level=level,
        answers=len(right),
        accuracy=accuracy,
        low=float(low),
        high=float(high),
        loss=nats / tokens,
    )


def _batches(corpus: SyntheticCorpus, level: int, answers: int) -> Iterator[list[tuple[str, _Spans]]]:
    """Texts of documents in groups, each with the places of the answers of its instances that no document before has."""
    seen, found, batch, last = set[str](), 0, [], 0
    for number in count():
        text = document_text(corpus, level, number, held_out=True)
        spans = _new_answers(text, seen)
        if spans:
            batch.append((text, spans))
            found, last = found + len(spans), number
        if len(batch) == _DOCUMENTS_PER_PASS:
            yield batch
            batch = []
        if found >= answers or number - last >= _MOST_WITHOUT_NEW:
            break
    if batch:
        yield batch


def _new_answers(text: str, seen: set[str]) -> _Spans:
    spans, start = _Spans(), 0
    for line in text.splitlines(keepends=True):
        if line not in seen:
            seen.add(line)
            spans += [(start + answer.start(1), start + answer.end(1)) for answer in _ANSWER.finditer(line)]
        start += len(line)
    return spans


def _encoded(encoder: DocumentEncoder, texts: Sequence[str]) -> Iterator[np.ndarray]:
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        check_bytes(text, ids)
        yield ids


def check_bytes(text: str, ids: np.ndarray) -> None:
    """Check that the tokens of a generated document, the start token among them, are its bytes.

    Raises:
        UserError: if they are not.
    """
    if len(ids) != len(text) + 1:
        raise UserError(
            "the model's tokens are not bytes, as those of generated documents are; score a model that was trained on a "
            "dataset of such documents"
        )
