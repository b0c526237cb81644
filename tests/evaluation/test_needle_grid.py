"""Scores of needles: by hand, for stand-ins that read everything or only the end, and of the engine against transformers."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import architecture, build
from transformers import PreTrainedTokenizerFast

from yoco_u.data import DocumentEncoder, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.evaluation.needle_grid import NeedleScore, NeedleSettings, check_needles, needle_grid, recall
from yoco_u.evaluation.needles import KINDS, Kind, NeedleMaker
from yoco_u.inference import LLM, Completion, RequestOutput, SamplingParams, TokenLogprobs
from yoco_u.inference.logprobs import Logprob

TEXT = "".join(f"def täglich_{i}(x, y):\n    return x * {i} + y  # and some more words\n\n" for i in range(120))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT, "One of the special magic numbers for a is: 12345678. VAR X"], 400)


class Reader:
    """Stands for an LLM that can repeat what it sees, and sees the last `sight` characters before the question."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sight: int) -> None:
        self.tokenizer, self.sight = tokenizer, sight
        self.engine = SimpleNamespace(
            tokenizer=tokenizer,
            max_model_len=5000,
            settings=SimpleNamespace(max_num_seqs=3),
            runner=SimpleNamespace(model=torch.nn.Linear(1, 1)),
        )
        self.calls: list[int] = []

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        self.calls.append(len(prompts))
        return [self._answer(ids, own) for ids, own in zip(prompts, params, strict=True)]

    def _answer(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        if params.max_tokens == 0:  # the answer is scored: about every second token is the likeliest
            scored = [TokenLogprobs(Logprob(token, -0.5 - (i % 2), 1 + i % 2), ()) for i, token in enumerate(ids)]
            start = params.prompt_logprobs_start
            return RequestOutput("", None, ids, [], 1, [*([None] * start), *scored[: len(ids) - start]])
        prompt = self.tokenizer.decode(ids, skip_special_tokens=True)
        end = max(prompt.rfind("\nWhat "), prompt.rfind("\nQuestion: "))
        seen = prompt[max(0, end - self.sight) : end]
        if "Question" in prompt:
            found = re.findall(r"VAR (\w+) =", seen)
        else:
            [key] = set(re.findall(r"numbers? for (\S+) mentioned", prompt))
            found = re.findall(rf"for {key} is: (\d+)", seen)
        text = " The answer is " + " and ".join(found).lower()
        return RequestOutput("", None, ids, [Completion(0, text)], 1)


def test_recall_by_hand() -> None:
    assert recall(["123"], " 123.") == 1
    assert recall(["123"], "12 3") == 0
    assert recall(["ABC", "DEF", "GHI", "JKL"], "abc, Def and xGHIx") == 0.75


def grid(llm: Any, **settings: Any) -> list[NeedleScore]:
    chosen = NeedleSettings(**{"lengths": (600, 700), "depths": 3, "samples": 2} | settings)
    done: list[int] = []
    scores = needle_grid(llm, chosen, TEXT, None, done.append)
    assert sum(done) == chosen.count == len(scores) * chosen.samples
    return scores


def test_a_model_that_reads_everything(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = Reader(tokenizer, 10**6)
    scores = grid(reader)
    assert [(score.kind, score.length, score.depth) for score in scores] == [
        (kind, length, depth) for kind in KINDS for length in (600, 700) for depth in (0, 0.5, 1)
    ]
    assert all(score.recall == 1 and score.samples == 2 for score in scores)
    assert set(reader.calls) == {3}
    for score in scores:
        assert 0.4 < score.token_accuracy < 0.75
        assert score.loss == pytest.approx(0.5 * score.token_accuracy + 1.5 * (1 - score.token_accuracy))


def test_a_model_that_sees_only_a_window(tokenizer: PreTrainedTokenizerFast) -> None:
    """It finds a needle that lies in the window, and of several needles those that lie in it."""
    found = {(score.kind, score.depth): score.recall for score in grid(Reader(tokenizer, 300), lengths=(1000,))}
    for kind in ("single_1", "single_2", "multi_key"):
        assert [found[kind, depth] for depth in (0, 0.5, 1)] == [0, 0, 1]
    assert found["multi_value", 0] == 0 and found["multi_value", 1] == 1 and 0 < found["multi_value", 0.5] < 1
    blind = grid(Reader(tokenizer, 0))
    assert all(score.recall == 0 for score in blind)


def test_depths_and_seeds(tokenizer: PreTrainedTokenizerFast) -> None:
    assert NeedleSettings(depths=1).depth_shares == (0.5,)
    assert NeedleSettings(depths=5).depth_shares == (0, 0.25, 0.5, 0.75, 1)
    prompts: dict[int, list[list[int]]] = {}
    for seed in (0, 1):
        reader = Reader(tokenizer, 0)
        answer = reader._answer
        prompts[seed] = []
        reader._answer = lambda ids, params, own=prompts[seed], answer=answer: (own.append(ids), answer(ids, params))[1]  # type: ignore[method-assign, misc]
        grid(reader, kinds=("single_2",), seed=seed)
    assert not {tuple(ids) for ids in prompts[0]} & {tuple(ids) for ids in prompts[1]}
    assert len({tuple(ids) for ids in prompts[0]}) == len(prompts[0])


def test_impossible_lengths_are_refused_before_anything_runs(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = Reader(tokenizer, 0)
    with pytest.raises(UserError, match="200 tokens are too few"):
        grid(reader, kinds=("single_1", "variable_tracking"), lengths=(700, 200))
    with pytest.raises(UserError, match="a length of 6000 tokens is more than the 5000"):
        grid(reader, lengths=(6000,))
    assert not reader.calls


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_refused_beforehand_can_be_made(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
    """The shortest length that is not refused is that of the needle which needs most, and is enough at every depth."""
    encoder = DocumentEncoder(tokenizer)
    maker = NeedleMaker(encoder, TEXT)

    def least(number: int) -> int:
        with pytest.raises(UserError) as caught:
            maker.make(kind, 60, 0, number)
        return int(re.findall(r"take (\d+)", str(caught.value))[0])

    seeds = range(15, 20)
    length = max(map(least, seeds))
    settings = NeedleSettings(kinds=(kind,), lengths=(2000, length), depths=2, samples=5, seed=3)
    check_needles(settings, encoder, TEXT)
    for number in seeds:
        for depth in settings.depth_shares:
            maker.make(kind, length, depth, number)
    with pytest.raises(UserError, match=f"{length - 1} tokens are too few"):
        check_needles(settings.model_copy(update={"lengths": (length - 1, 2000)}), encoder, TEXT)


def test_a_haystack_that_holds_all_values_is_refused_beforehand(tokenizer: PreTrainedTokenizerFast) -> None:
    """A short piece of it lacks most of them."""
    haystack = "".join(f"{number} {'words ' * 40}\n" for number in range(10, 100))
    settings = NeedleSettings(kinds=("single_2",), lengths=(500,), samples=3, digits=2)
    check_needles(settings, DocumentEncoder(tokenizer), haystack)
    with pytest.raises(UserError, match="the haystack holds nearly every value"):
        check_needles(settings.model_copy(update={"lengths": (500, 9000)}), DocumentEncoder(tokenizer), haystack)


@pytest.mark.parametrize(("kind", "num_loops"), [("single_2", None), ("multi_value", 2)])
def test_the_engine_gives_what_transformers_gives(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: Kind, num_loops: int | None
) -> None:
    """transformers' `generate()` gives the recall, one pass over prompt and answer the likelihood; both agree within 2e-5."""
    model = build(architecture("yoco_u", vocab_size=len(tokenizer)), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="float32", cache_tokens=4096, max_num_seqs=4, block_size=16, max_batched_tokens=128)
    scores = needle_grid(llm, NeedleSettings(kinds=(kind,), lengths=(650,), depths=2, samples=2), TEXT, num_loops)
    for score in scores:
        expected = []
        for seed in range(2):
            needle = NeedleMaker(DocumentEncoder(tokenizer), TEXT).make(score.kind, 650, score.depth, seed)
            row = torch.tensor([needle.prompt_ids + needle.answer_ids])
            start = len(needle.prompt_ids)
            with torch.no_grad():
                logprobs = model(row, num_loops=num_loops).logits[0, start - 1 : -1].log_softmax(-1)
                out = model.generate(
                    row[:, :start], attention_mask=torch.ones(1, start), max_new_tokens=needle.max_tokens, do_sample=False,
                    eos_token_id=tokenizer.eos_token_id, **({} if num_loops is None else {"num_loops": num_loops}),
                )  # fmt: skip
            text = tokenizer.decode(out[0, start:], skip_special_tokens=True)
            answer = torch.tensor(needle.answer_ids)
            likeliest = (logprobs.argmax(-1) == answer).float().mean()
            expected.append(
                [recall(needle.answers, text), float(likeliest), -float(logprobs.gather(-1, answer[:, None]).mean())]
            )
        wanted = torch.tensor(expected).mean(0)
        torch.testing.assert_close(torch.tensor([score.recall, score.token_accuracy, score.loss]), wanted, rtol=0, atol=2e-5)
