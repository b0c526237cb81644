"""Speculative decoding against the plain engine, token for token: whatever is drafted, and whatever else a request asks for."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import scipy.stats
import torch
from engine_runs import (
    VARIANTS,
    FixedLengths,
    assert_greedy,
    drafting_engine,
    drain,
    engine,
    full_logprobs,
    greedy,
    output,
    prompt,
    run,
)
from examples import covering
from models import architecture, build
from test_engine_sampling import sampled
from torch import Tensor

from yoco_u.data import train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams, speculation
from yoco_u.inference.sampler import guess, sample
from yoco_u.inference.sampler_state import SamplerState

LOOPING = ["yoco_u", "universal_transformer", "rins", "upper_loop_without_shared_kv", "window 3"]


def guesses(monkeypatch: pytest.MonkeyPatch, tokens: Callable[[SamplerState, int], int]) -> None:
    """Let the model's drafts be these tokens, by the state of their output and how far ahead they are."""

    def made_up(logits: Tensor, states: Sequence[SamplerState], ahead: int) -> list[int]:
        return [tokens(state, ahead) for state in states]

    monkeypatch.setattr(speculation, "guess", made_up)


def counts(subject: Engine) -> tuple[int, int]:
    return subject.speculation.accepted, subject.speculation.rejected


CLOSED = "nearly closed gates"


def same(
    subject: Engine, plain: Engine, prompts: list[list[int]], params: list[SamplingParams], near: float = 2e-5
) -> list[RequestOutput]:
    """Run requests on an engine that drafts, and assert that they give what they give on a plain one."""
    found = run(subject, prompts, params)
    expected = run(plain, prompts, [own.model_copy(update={"drafts": None}) for own in params])
    for request, other in zip(found, expected, strict=True):
        for one, its in zip(request.outputs, other.outputs, strict=True):
            assert (one.token_ids, one.text) == (its.token_ids, its.text)
            assert (one.finish_reason, one.stop_reason, one.error) == (its.finish_reason, its.stop_reason, its.error)
            for a, b in zip(one.logprobs or [], its.logprobs or [], strict=True):
                assert a.chosen.token_id == b.chosen.token_id and abs(a.chosen.logprob - b.chosen.logprob) < near
    return found


@pytest.mark.parametrize(
    ("variant", "by"),
    covering([name for name in VARIANTS if name not in ("yoco_retention", "four kinds")], ["loops", "prompt"]),
)
def test_every_architecture(variant: str, by: str) -> None:
    subject = drafting_engine(variant, drafts=by)
    for request in run(subject, [prompt(length, seed=length) for length in (1, 7, 21)], greedy()):
        assert_greedy(variant, request)
    if variant in LOOPING and by == "loops":
        assert sum(counts(subject)) > 0


@pytest.mark.parametrize(
    ("right", "length", "variant"),
    [(*how, variant) for how, variant in covering([*itertools.product(["always", "never", "at random"], [2, 7])], LOOPING)],
)
def test_drafts_that_are_right_wrong_and_mixed(variant: str, right: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafts are made up from what the plain engine gave; if all are right, all but one token of each step were drafted."""
    prompts, new = [prompt(3 + 4 * i, seed=i) for i in range(3)], 12
    expected = [output(request) for request in run(engine(variant), prompts, greedy(max_tokens=new))]
    generator = torch.Generator().manual_seed(length)
    subject = drafting_engine(variant, length, drafts="loops", block_size=64 if right == "always" else 4)
    truth: dict[SamplerState, list[int]] = {}

    def made_up(state: SamplerState, ahead: int) -> int:
        token, place = truth[state], state.num_tokens + ahead
        is_right = right == "always" or (right == "at random" and bool(torch.rand((), generator=generator) < 0.7))
        return token[place] if is_right else (token[place] + 1) % 96

    guesses(monkeypatch, made_up)
    requests = [subject.add(ids, greedy(max_tokens=new)) for ids in prompts]
    truth.update({own.sampler: tokens for own, tokens in zip(subject._outputs.values(), expected, strict=True)})
    drain(subject)
    assert [output(request) for request in requests] == expected
    accepted, rejected = counts(subject)
    assert (rejected == 0) == (right == "always") and (accepted == 0) == (right == "never")
    if right == "always":
        steps = -(-(new - 1) // (1 + min(length, subject.speculation._most)))
        assert [request.outputs[0].accepted_drafts for request in requests] == [new - 1 - steps] * 3


@pytest.mark.parametrize(("variant", "by"), covering([CLOSED, "rins"], ["loops", "prompt"]))
def test_sampled_tokens_are_the_same(variant: str, by: str) -> None:
    """With penalties, filters, another T and log-probabilities; drafts draw with the random number of their place."""
    bias = {7: 6.0, 9: 6.0}  # so that tokens repeat
    params = [sampled(i, drafts=by, logprobs=i % 3, logit_bias=bias, n=1 + i % 2) for i in range(7)]
    prompts = [[*prompt(4, seed=i), *prompt(6, seed=1), *prompt(4, seed=i)] for i in range(7)]
    subject = drafting_engine(variant, 3, max_num_seqs=6)
    same(subject, engine(variant), prompts, params)
    assert counts(subject)[0] > 10


def test_a_draft_draws_with_the_random_number_of_its_place() -> None:
    """So that a model which drafts as it samples has all its drafts accepted."""
    state = SamplerState(SamplingParams(seed=3, top_k=50), [], 0, ())
    logits = torch.randn(12, 96)
    guessed = [guess(logits[i : i + 1], [state], i)[0] for i in range(12)]
    found = [one.token for one in (sample(logits[i : i + 1], [state])[0] for i in range(12)) if one is not None]
    assert guessed == found and len(set(found)) > 6


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_requests_of_all_kinds_share_a_batch(kv_dtype: str) -> None:
    loops = [3, 1, 2, 4, 3, 3]
    by: list[Any] = ["loops", "loops", "prompt", "loops", "none", None]
    params = [greedy(num_loops=n, drafts=how, logprobs=2) for n, how in zip(loops, by, strict=True)]
    prompts = [prompt(9, seed=2) * 2, *(prompt(5 + 7 * i, seed=i) for i in range(5))]
    subject = drafting_engine(CLOSED, 5, max_num_seqs=6, kv_dtype=kv_dtype, drafts="prompt")
    near = 2e-5 if kv_dtype == "float32" else 1e-3  # a key or value between two whole numbers may be rounded to the other
    found = same(subject, engine(CLOSED, kv_dtype=kv_dtype), prompts, params, near)
    drafted = [request.outputs[0].accepted_drafts + request.outputs[0].rejected_drafts for request in found]
    assert drafted[0] and drafted[3] and not drafted[1] and not drafted[4]  # one loop drafts nothing


def test_the_distribution_of_one_position() -> None:
    """Chi-square of the second token of 800 outputs, all of which had a draft there, against the model's own distribution."""
    count, ids = 800, [5]
    subject = drafting_engine(CLOSED, 1, max_num_seqs=64, max_batched_tokens=200, prefix_caching=False)
    params = SamplingParams(n=count, max_tokens=2, seed=9, ignore_eos=True, drafts="loops", top_k=12)
    [request] = run(subject, [ids], params)
    first = full_logprobs(CLOSED, ids)[-1]
    expected = torch.zeros(96)
    for token, share in top(first, 12):
        for second, chance in top(full_logprobs(CLOSED, [*ids, token])[-1], 12):
            expected[second] += share * chance * count
    found = torch.bincount(torch.tensor([one.token_ids[1] for one in request.outputs]), minlength=96).float()
    assert sum(counts(subject)) == count and counts(subject)[0] > count // 2
    few = expected < 5
    assert found[expected == 0].sum() == 0
    observed, theory = (torch.cat([x[~few], x[few].sum()[None]]).double() for x in (found, expected))
    statistic = float(((observed - theory) ** 2 / theory).sum())
    assert scipy.stats.chi2.sf(statistic, len(theory) - 1) > 1e-3


def top(logprobs: Tensor, count: int) -> list[tuple[int, float]]:
    values, tokens = logprobs.topk(count)
    return list(zip(tokens.tolist(), values.softmax(0).tolist(), strict=True))


def test_texts_that_end_inside_a_draft() -> None:
    """Stop strings, end tokens, grammars and least lengths, with tokens that were drafted behind the end."""
    tokenizer = train_tokenizer(['one two three, 12 délta {"a": 1}\n'] * 20, 300)
    built = build(architecture("yoco_u", vocab_size=len(tokenizer) + 3, loop_gate=0.3))
    with torch.no_grad():
        built.model.stages[0].loop_gates.fill_(0.02)
    settings = EngineSettings(dtype="float32", cache_tokens=1024, block_size=16, max_num_seqs=4, max_batched_tokens=40)
    plain, subject = (Engine(built, tokenizer, settings) for _ in range(2))
    subject.speculation.lengths = FixedLengths(4)
    kinds: list[dict[str, Any]] = [
        {"stop": ["e", "12", " "]}, {"stop": ["th"], "min_tokens": 6}, {"regex": "(one|two)( [a-z]+){2,9}"},
        {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}, {"stop_token_ids": list(range(20, 120))},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 1},
    ]  # fmt: skip
    greedily = [{"drafts": "prompt", "temperature": 0} | kind for kind in kinds]
    params = [
        SamplingParams(**{"seed": i, "max_tokens": 24, "drafts": "loops"} | kind) for i, kind in enumerate([*kinds, *greedily])
    ]
    prompts = [tokenizer("one two three, 12 one two th").input_ids[: 5 + i] for i in range(len(params))]
    same(subject, plain, prompts, params)
    assert counts(subject)[0] > 10


def test_the_next_turn_finds_as_much_in_the_prefix_cache() -> None:
    ids = prompt(9)
    cached = []
    for subject in (engine(CLOSED), drafting_engine(CLOSED, 5, drafts="loops")):
        [first] = run(subject, [ids], greedy(max_tokens=23))
        [second] = run(subject, [[*ids, *output(first), *prompt(3, seed=4)]], greedy())
        assert_greedy(CLOSED, second)
        cached.append(second.cached_tokens)
    assert cached[0] == cached[1] > 20
    assert counts(subject)[0] > 0


def test_a_full_cache_drops_drafts_and_preempts_nobody() -> None:
    """Two requests that fill the cache to its last block, whose drafts would need more; then some that must give way anyway."""
    for tokens, block_size, preempts in ((48, 4, False), (40, 2, True)):
        settings = {"cache_tokens": tokens, "block_size": block_size, "prefix_caching": False, "drafts": "loops"}
        subject = drafting_engine(CLOSED, 7, **settings)
        requests = [subject.add(prompt(12, seed=seed), greedy(max_tokens=12)) for seed in (1, 2)]
        least = tokens
        while subject.unfinished:
            subject.step()
            least = min(least, subject.scheduler.pool.num_available)
        for request in requests:
            assert_greedy(CLOSED, request, new=12)
        assert least == 0 or not preempts
        assert (subject.scheduler.statistics.preemptions > 0) == preempts
        assert counts(subject)[0] > 0


def test_updates_of_a_step_are_one() -> None:
    subject = drafting_engine(CLOSED, 7, drafts="loops", block_size=64)
    request = subject.add(prompt(9), greedy(logprobs=0))
    updates = [update for _ in range(20) for update in subject.step()]
    assert [token for update in updates for token in update.token_ids] == output(request)
    assert len(updates) < len(output(request)) and max(len(update.token_ids) for update in updates) > 2
    assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + ["length"]


@pytest.mark.parametrize("variant", ["upper_loop", "yoco_u"])
def test_models_and_requests_without_a_first_loop_to_draft_with(variant: str) -> None:
    subject = drafting_engine(variant, drafts="loops")
    [request] = run(subject, [prompt(9)], greedy(num_loops=1 if variant == "yoco_u" else None))
    assert counts(subject) == (0, 0)
    assert_greedy(variant, request, 1 if variant == "yoco_u" else None)


def test_retention_cannot_take_drafts_back() -> None:
    with pytest.raises(UserError, match=r"drafts is loops, but .* retention"):
        engine("yoco_retention", drafts="loops")
    with pytest.raises(UserError, match=r"drafts is prompt, but .* retention"):
        engine("yoco_retention").add(prompt(3), greedy(drafts="prompt"))
    with pytest.raises(UserError, match="drafts"):
        greedy(drafts="loop")


def test_by_default_nothing_is_drafted_and_the_measured_lengths_change_no_token() -> None:
    assert EngineSettings().drafts == "none"
    for by in ("none", "loops", "prompt"):
        subject = engine(CLOSED, max_batched_tokens=40, drafts=by)
        for request in run(subject, [prompt(5, seed=i) * 3 for i in range(3)], greedy(max_tokens=30)):
            assert_greedy(CLOSED, request, new=30)
        assert (sum(counts(subject)) > 0) == (by != "none")
