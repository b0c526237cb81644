"""Loss by context length: the targets are the same behind every prefix, and one pass of the model gives the same losses."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import architecture, build, tokens

from yoco_u.data import train_tokenizer
from yoco_u.errors import UserError
from yoco_u.evaluation.context import context_scores, take_texts, text_losses
from yoco_u.inference import LLM, RequestOutput, SamplingParams, TokenLogprobs
from yoco_u.inference.logprobs import Logprob

PREFIXES, LAST = (1, 5, 16, 40), 12


def test_texts_are_cut_one_after_another() -> None:
    documents = [np.arange(25), np.arange(100, 107), np.arange(200, 210)]
    assert take_texts(documents, 10) == [(list(range(10)), 0), (list(range(10, 20)), 0), (list(range(200, 210)), 2)]
    assert take_texts(documents, 10, limit=1) == [(list(range(10)), 0)]
    assert take_texts(documents, 25) == [(list(range(25)), 0)]
    with pytest.raises(UserError, match=r"together, 26 tokens; the longest has 25: name longer files"):
        take_texts(documents, 26)


class Recorder:
    """Stands for an LLM: the loss of a token in nats is the number of tokens before it, divided by a thousand."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.engine = SimpleNamespace(runner=SimpleNamespace(model=torch.nn.Linear(1, 1)))

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        self.asked += zip(prompts, params, strict=True)
        return [
            RequestOutput(
                "", None, ids, [], 1,
                [
                    None if i < own.prompt_logprobs_start else TokenLogprobs(Logprob(token, -i / 1000, 1), ())
                    for i, token in enumerate(ids)
                ],
            )
            for ids, own in zip(prompts, params, strict=True)
        ]  # fmt: skip


def test_only_the_context_differs() -> None:
    texts = [tokens(1, 52, seed=seed)[0].tolist() for seed in range(3)]
    recorder, done = Recorder(), []
    losses = text_losses(recorder, texts, PREFIXES, LAST, 3, lambda: done.append(1))  # type: ignore[arg-type]
    assert losses.shape == (3, 4) and len(done) == 3
    for number, (prompt, params) in enumerate(recorder.asked):
        text, prefix = texts[number // 4], PREFIXES[number % 4]
        assert prompt == text[-LAST - prefix :]
        assert prompt[params.prompt_logprobs_start :] == text[-LAST:]
        assert params.num_loops == 3
    np.testing.assert_allclose(losses, [[(prefix + (LAST - 1) / 2) / 1000 for prefix in PREFIXES]] * 3)


@pytest.mark.parametrize("name", ["yoco_u", "transformer", "rins", "yoco_retention", "universal_transformer"])
def test_losses_are_those_of_one_pass_of_the_model(name: str, tmp_path: Path) -> None:
    """The engine runs prompts in chunks of 16 tokens, the model the whole text at once; they agree within 2e-5 nats."""
    tokenizer = train_tokenizer(["x"], 300)
    model = build(architecture(name, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="float32", cache_tokens=512, max_batched_tokens=16, block_size=8)
    texts = [tokens(1, 52, len(tokenizer), seed)[0].tolist() for seed in range(2)]
    loops: list[int | None] = [None, 1, 3] if name == "yoco_u" else [None]
    for num_loops in loops:
        found = text_losses(llm, texts, PREFIXES, LAST, num_loops)
        for text, losses in zip(texts, found, strict=True):
            for prefix, loss in zip(PREFIXES, losses, strict=True):
                row = torch.tensor([text[-LAST - prefix :]])
                with torch.no_grad():
                    logprobs = model(row, num_loops=num_loops, use_cache=False).logits[0, prefix - 1 : -1].log_softmax(-1)
                assert loss == pytest.approx(-float(logprobs.gather(-1, row[0, prefix:, None]).mean()), abs=2e-5)


def test_scores_by_hand() -> None:
    first, second = context_scores(np.array([[2.0, 1.5], [3.0, 2.7]]), (8, 16), [0, 4])
    assert (first.prefix, first.loss, first.change, first.change_error) == (8, 2.5, 0, 0)
    assert second.loss == pytest.approx(2.1)
    assert second.perplexity == pytest.approx(np.exp(2.1))
    assert second.change == pytest.approx(-0.4)
    assert second.change_error == pytest.approx(0.1)  # the standard error of -0.5 and -0.3
    assert context_scores(np.array([[2.0, 1.5]]), (8, 16), [0])[1].change_error is None


def test_the_standard_error_of_a_change_holds_where_the_pieces_of_a_document_are_alike() -> None:
    generator, changes, errors = np.random.default_rng(0), [], []
    documents = np.repeat(np.arange(30), generator.integers(1, 8, 30))
    for _ in range(300):
        change = (0.1 * generator.normal(size=30))[documents] + 0.05 * generator.normal(size=len(documents))
        score = context_scores(np.stack([np.zeros_like(change), change], axis=1), (8, 16), documents.tolist())[1]
        changes.append(score.change)
        errors.append(score.change_error or 0.0)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(changes), rel=0.15)
    assert context_scores(np.ones((3, 2)), (8, 16), [7, 7, 7])[1].change_error is None
