"""The sampler against transformers' logits processors, exact probabilities and itself one row at a time."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from yoco_u.inference.logprobs import score
from yoco_u.inference.packed_upload import upload_arrays
from yoco_u.inference.sampler import sample, step_arrays
from yoco_u.inference.sampler_state import SamplerState
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.token_filters import allowed, biased, filtered, penalized

EOS = 0


def state(params: SamplingParams, prompt: list[int] = [1, 2], output: list[int] = [], index: int = 0) -> SamplerState:  # noqa: B006
    result = SamplerState(params, prompt, index, [EOS])
    for token in output:
        result.append(token)
    return result


def random_logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.6, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.dictionaries(st.integers(0, 4), st.floats(-100, 100, width=32), max_size=3),
    min_tokens=st.sampled_from([0, 2]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([None, 0, 2, 5]),
)


def reference(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """The distribution of one row, (vocab,), by transformers' processors."""
    ids = torch.tensor([prompt + output])
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits[None].clone())
    for token, count in Counter(output).items():
        scores[0, token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        scores[0, token] += bias
    if len(output) < params.min_tokens:
        scores[0, EOS] = -math.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(ids, scores)[0].softmax(-1)


def distribution(logits: Tensor, states: list[SamplerState]) -> Tensor:
    arrays = step_arrays(states, logits.shape[-1])
    given = upload_arrays(arrays, logits.device)
    weights = filtered(allowed(biased(penalized(logits, given), given), given), arrays, given)
    return weights / weights.sum(-1, keepdim=True)


# vocabularies below and above the number of candidates that top-p looks at first
@given(st.lists(random_params, min_size=1, max_size=5), st.sampled_from([5, 40, 3000]), st.integers(0, 999), st.data())
def test_the_distribution_is_that_of_transformers(params, vocab, seed, data):
    params = [one.model_copy(update={"temperature": one.temperature or 1.0}) for one in params]
    tokens = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=8)
    prompts, outputs = ([data.draw(tokens) for _ in params] for _ in range(2))
    logits = random_logits(seed, len(params), vocab) * data.draw(st.sampled_from([0.2, 1.0]))
    states = [state(*row) for row in zip(params, prompts, outputs, strict=True)]
    before = logits.clone()
    ours = distribution(logits, states)
    assert torch.equal(logits, before)
    for row in range(len(params)):
        theirs = reference(logits[row], params[row], prompts[row], outputs[row])
        assert torch.equal(ours[row] > 0, theirs > 0)
        torch.testing.assert_close(ours[row], theirs)


LARGEST = torch.finfo(torch.float32).max
large = st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38])  # of which no sum depends on the rounding


@given(
    logits=st.lists(large, min_size=4, max_size=4),
    temperature=st.sampled_from([1.1e-5, 0.5, 1.0, 1e30]),
    repetition=st.sampled_from([1.0, 1.2e-38, 3e38]),
    presence=large,
    frequency=large,
    bias=st.dictionaries(st.integers(0, 3), large),
    output=st.lists(st.integers(0, 3), max_size=4),
)
def test_the_distribution_holds_where_float32_overflows(logits, temperature, repetition, presence, frequency, bias, output):
    """Against float64, in which nothing does; what lies beyond float32's largest number counts as that number."""
    scores = np.array(logits)
    for token in range(4):
        if token in [*output, 1, 2]:
            scores[token] *= repetition if scores[token] < 0 else 1 / repetition
        count = output.count(token)
        scores[token] -= np.clip(presence * (count > 0) + frequency * count, -LARGEST, LARGEST)
    scores = np.clip(scores, -LARGEST, LARGEST)
    for token, value in bias.items():
        scores[token] = np.clip(scores[token] + value, -LARGEST, LARGEST)
    expected = torch.tensor((scores - scores.max()) / temperature).softmax(-1)
    penalties = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    one = state(SamplingParams(temperature=temperature, logit_bias=bias, seed=1, **penalties), output=output)
    raw = torch.tensor([logits])
    torch.testing.assert_close(distribution(raw, [one])[0].double(), expected, rtol=0, atol=1e-5)
    assert expected[sample(raw, [one])[0].token] > 0
    greedy = state(SamplingParams(temperature=0, logit_bias=bias, **penalties), output=output)
    assert sample(raw, [greedy])[0].token == scores.astype(np.float32).argmax()


def test_a_large_vocabulary_and_a_nucleus_wider_than_the_candidates():
    logits = random_logits(0, 2, 100_000) * torch.tensor([[0.1], [1.0]])
    params = [SamplingParams(top_p=0.9)] * 2
    ours = distribution(logits, [state(one) for one in params])
    assert (ours > 0).sum(-1).tolist()[0] > 50_000
    for row in range(2):
        theirs = reference(logits[row], params[row], [1], [])
        # float32 sums of 100,000 probabilities leave the border of theirs uncertain by a few tokens
        assert ((ours[row] > 0) != (theirs > 0)).sum() < 50


@given(st.lists(random_params, min_size=2, max_size=6), st.sampled_from([7, 33, 1025, 2050]), st.integers(0, 999), st.data())
def test_a_row_gives_the_same_alone_as_in_any_batch(params, vocab, seed, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    together = [state(one, index=index) for index, one in enumerate(params)]
    alone = [state(one, index=index) for index, one in enumerate(params)]
    for step in range(3):
        logits = random_logits(seed + step, len(params), vocab, dtype=dtype)
        batch = sample(logits, together)
        assert batch == [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(alone)]
        order = data.draw(st.permutations(range(len(params))))
        together, alone, params = ([rows[row] for row in order] for rows in (together, alone, params))


def test_a_row_of_a_large_vocabulary_gives_the_same_alone_on_several_threads():
    params = [SamplingParams(seed=n, top_p=0.9, logprobs=3) for n in range(6)] + [SamplingParams(temperature=0, logprobs=3)]
    logits = random_logits(1, len(params), 100_003)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        batch = sample(logits, [state(one) for one in params])
        alone = [sample(logits[row : row + 1], [state(one)])[0] for row, one in enumerate(params)]
        torch.set_num_threads(1)
        assert batch == alone == sample(logits, [state(one) for one in params])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1, "repetition_penalty": 1.5}]
)
def test_tokens_come_as_often_as_they_should(settings):
    """Chi-square over 20,000 outputs: half of them seeds, half of them indices of one seed."""
    logits, draws = random_logits(3, 1, 12), 10_000
    seeds = [SamplingParams(seed=n, **settings) for n in range(draws)]
    states = [state(one) for one in seeds] + [state(seeds[0], index=n) for n in range(1, draws + 1)]
    tokens = [sampled.token for sampled in sample(logits.expand(len(states), -1), states)]
    check_frequencies(tokens, reference(logits[0], seeds[0], [1, 2], []))


def test_successive_tokens_are_independent():
    logits, one = random_logits(4, 1, 3), state(SamplingParams(seed=5))
    tokens = [sample(logits, [one])[0].token for _ in range(8000)]
    single = logits[0].softmax(-1)
    check_frequencies(
        [3 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)], torch.outer(single, single).flatten()
    )


def check_frequencies(tokens: list[int], probabilities: Tensor) -> None:
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = (probabilities > 0).numpy()
    assert counts[~possible].sum() == 0
    expected = probabilities.double().numpy()[possible] * len(tokens)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # mean and standard deviation of chi-square


def test_seeds_repeat_and_their_absence_does_not():
    logits = torch.zeros(1, 1000)

    def tokens(seed: int | None, index: int) -> list[int]:
        one = state(SamplingParams(seed=seed), index=index)
        return [sample(logits, [one])[0].token for _ in range(5)]

    assert tokens(7, 0) == tokens(7, 0)
    assert len({tuple(tokens(*which)) for which in [(7, 0), (7, 1), (8, 0), (None, 0), (None, 0)]}) == 5


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-math.inf, -2.0, -math.inf, -2.0]])
    for dtype in (torch.float32, torch.bfloat16):
        states = [state(SamplingParams(temperature=temperature)) for temperature in (0, 1e-9, 0)]
        assert [sampled.token for sampled in sample(logits.to(dtype), states)] == [1, 0, 1]


def test_equals_at_a_border_stay_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for settings in ({"top_k": 2}, {"top_p": 0.6}):
        assert (distribution(logits, [state(SamplingParams(**settings))]) > 0).tolist() == [[True, True, True, False]]


@given(random_params, random_params, st.integers(0, 3))
def test_a_broken_row_fails_alone(good, bad, kind):
    logits = random_logits(9, 3, 11)
    logits[1, 3] = [math.nan, math.inf, math.nan, -math.inf][kind]
    if kind == 2:
        logits[1] = math.nan
    if kind == 3:
        logits[1] = -math.inf
    states = [state(good), state(bad), state(good, index=1)]
    results = sample(logits, states)
    assert results[1] is None and states[1].num_tokens == 0
    assert states[1].failure == ("no token may come next" if kind == 3 else "the model's logits hold NaN or infinity")
    assert [results[0], results[2]] == sample(logits[[0, 2]], [state(good), state(good, index=1)])
    assert states[0].failure is None and states[0].num_tokens == 1


@given(random_params, st.integers(0, 99))
def test_impossible_tokens_never_come(params, seed):
    logits = random_logits(seed, 1, 50)
    logits[0, 1:] = torch.where(torch.rand(49) < 0.7, -math.inf, logits[0, 1:])
    logits[0, 1] = 0.0
    one = state(params)
    for _ in range(5):
        assert logits[0, sample(logits, [one])[0].token] > -math.inf


def test_the_last_uniform_does_not_fall_off_the_end():
    one = state(SamplingParams())
    one.uniform = lambda ahead=0: math.nextafter(1.0, 0.0)
    logits = torch.tensor([[0.1, 0.3, 0.7, -math.inf, -math.inf]])
    assert sample(logits, [one])[0].token == 2
    one.uniform = lambda ahead=0: 0.0
    assert sample(logits.flip(-1), [one])[0].token == 2


def test_min_tokens_keeps_every_end_away():
    logits = torch.tensor([[9.0, 1.0, 8.0, 7.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2, 1000])
    one = state(params)
    assert [sample(logits, [one])[0].token for _ in range(3)] == [3, 3, EOS]
    ignoring = state(params.model_copy(update={"ignore_eos": True}))
    assert sample(logits, [ignoring])[0].token == EOS
    assert one.stop_token_ids == {EOS, 2, 1000} and ignoring.stop_token_ids == {2, 1000}


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = random_logits(2, 3, 30)
    params = [SamplingParams(temperature=0.1, top_k=2, presence_penalty=1.0, logprobs=top, seed=1) for top in (0, None, 4)]
    results = sample(logits, [state(one) for one in params])
    exact = logits.double().log_softmax(-1)
    assert results[1].logprob is None and results[1].top == () == results[0].top
    for row in (0, 2):
        chosen = results[row].logprob
        assert chosen.token_id == results[row].token
        assert chosen.logprob == pytest.approx(exact[row, chosen.token_id].item(), abs=1e-5)
        assert chosen.rank == 1 + (logits[row] > logits[row, chosen.token_id]).sum()
    assert [one.token_id for one in results[2].top] == exact[2].argsort(descending=True)[:4].tolist()
    assert [one.rank for one in results[2].top] == [1, 2, 3, 4]


@given(st.integers(0, 999), st.integers(0, 8), st.sampled_from([3, 6, 40]))
def test_scores_of_given_tokens_with_many_equals(seed, top, vocab):
    logits = random_logits(seed, 5, vocab).round().to(torch.bfloat16)  # few distinct values
    targets = torch.arange(5) % vocab
    exact = logits.double().log_softmax(-1)
    for row, (target, likeliest) in enumerate(score(logits, targets, top)):
        assert target.token_id == targets[row]
        order = sorted(range(vocab), key=lambda token: (-logits[row, token].item(), token))
        assert [one.token_id for one in likeliest] == order[:top]
        for one in (target, *likeliest):
            assert one.logprob == pytest.approx(exact[row, one.token_id].item(), abs=1e-5)
            assert one.rank == 1 + (logits[row] > logits[row, one.token_id]).sum()
