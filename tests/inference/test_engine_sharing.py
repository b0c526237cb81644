"""What requests share and what they give way to: prefix hits, several outputs of a prompt, preemption, prompt scores."""

from typing import Any

import pytest
import torch
from engine_runs import (
    VARIANTS,
    WINDOW,
    assert_all_free,
    assert_greedy,
    assert_ranked,
    chosen_logprobs,
    engine,
    full_logprobs,
    generated,
    greedy,
    output,
    prompt,
    run,
)
from examples import covering
from models import PRESETS

from yoco_u.inference import Engine, RequestOutput, SamplingParams

BLOCK = 4
STATELESS = {"transformer", "universal_transformer", "rins", "parscale"}  # no window, no state: blocks are all there is


def check_prompt_logprobs(request: RequestOutput, variant: str, loops: int | None = None) -> None:
    """Within 2e-5 of one pass over the whole prompt, with the ranks of that pass."""
    ids, found = request.prompt_token_ids, request.prompt_logprobs
    assert found is not None and found[0] is None and len(found) == len(ids)
    truth = full_logprobs(variant, ids, loops)
    for position, one in enumerate(found[1:], start=1):
        assert one is not None
        assert one.chosen.token_id == ids[position] and len(one.top) == 2
        assert_ranked(one, truth[position - 1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_hits(variant: str) -> None:
    """None, full, partial and at a point where two prompts part, each with the tokens that were found again."""
    subject = engine(variant, max_batched_tokens=10, block_size=BLOCK)
    base = prompt(26)
    blocks_suffice = variant in STATELESS | {"streams with qk norm"}
    cases: list[tuple[list[int], int]] = [
        (base, 0),
        (base, 24),  # the last full block before the last token
        (base[:25], 24),
        ([*base, *prompt(9, seed=2)], 24),
        (prompt(20, seed=3), 0),
        ([*base[:14], *prompt(8, seed=4)], 12 if blocks_suffice else 0),  # leaves a known prefix where nothing was kept
        ([*base[:14], *prompt(8, seed=5)], 12),  # and now it was
        (base[:3], 0),
    ]
    for ids, cached in cases:
        [request] = run(subject, [ids], greedy(max_tokens=2))
        assert_greedy(variant, request, new=2)
        assert request.cached_tokens == cached, len(ids)


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "yoco_retention", "four kinds"])
def test_an_answer_continued_is_not_computed_again(variant: str) -> None:
    subject = engine(variant)
    ids = prompt(15)
    [first] = run(subject, [ids], greedy())
    longer = ids + output(first) + prompt(5, seed=2)
    [second] = run(subject, [longer], greedy())
    assert output(second) == generated(variant, longer)
    assert second.cached_tokens == 20  # of 22 that were computed


def test_another_loop_count_is_another_cache() -> None:
    subject = engine()
    ids = prompt(22)
    for loops, cached in ((3, 0), (2, 0), (3, 20), (2, 20), (4, 0)):
        [request] = run(subject, [ids], greedy(num_loops=loops))
        assert output(request) == generated("yoco_u", ids, loops=loops)
        assert request.cached_tokens == cached


STATE = 2 * 2 * WINDOW * 8 * 4 * 6  # bytes of a window state: keys and values, heads, rows, head_dim, float32, (loop, layer)


@pytest.mark.parametrize(
    ("settings", "kept", "cached"),
    [
        ({"prefix_caching": False}, 0, 0),
        ({"snapshot_bytes": 0}, 0, 0),
        ({"snapshot_bytes": STATE - 1}, 0, 0),
        ({"snapshot_bytes": 3 * STATE + 1}, 3, 20),
    ],
)
def test_snapshots_stay_within_their_budget(settings: dict[str, Any], kept: int, cached: int) -> None:
    subject = engine(**settings)
    for seed in (1, 2, 3, 3):
        [request] = run(subject, [prompt(22, seed)], greedy(max_tokens=2))
        assert output(request) == generated("yoco_u", prompt(22, seed), 2)
    assert request.cached_tokens == cached
    assert subject.scheduler.snapshots.bytes == kept * STATE


def test_shared_blocks_are_not_written_again() -> None:
    """A request that computes shared positions anew, for its window, leaves what others read bit for bit."""
    subject = engine(snapshot_bytes=0, max_batched_tokens=7)
    ids = prompt(26)
    run(subject, [ids], greedy(max_tokens=1))
    pages = subject.cache.global_kvs[0].data
    before = pages.clone()
    second = subject.add(ids, greedy(max_tokens=1))
    subject.step()
    shared = subject.scheduler.running[0].blocks[:6]
    rows = (torch.tensor(shared)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    while subject.unfinished:
        subject.step()
    assert torch.equal(pages[:, :, rows], before[:, :, rows])
    assert output(second) == generated("yoco_u", ids, 1)


@pytest.mark.parametrize("variant", [*PRESETS, "experts", "four kinds"])
def test_requests_that_give_way(variant: str) -> None:
    """Blocks for two of six: whoever is driven out goes on later as if nothing had been."""
    prompts = [prompt(9 + i, seed=i) for i in range(6)]
    params = [greedy(max_tokens=20, logprobs=0, num_loops=1 + i % 2) for i in range(6)]
    subject = engine(variant, cache_tokens=64, max_num_seqs=6, max_batched_tokens=12)
    found = run(subject, prompts, params)
    assert subject.scheduler.statistics.preemptions > 1
    for request, ids, own in zip(found, prompts, params, strict=True):
        assert_greedy(variant, request, own.num_loops, 20)
        truth = full_logprobs(variant, ids + output(request), own.num_loops)[len(ids) - 1 : -1]
        expected = truth.gather(-1, torch.tensor(output(request))[:, None])[:, 0]
        torch.testing.assert_close(chosen_logprobs(request.outputs[0]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("block_size", "prefix_caching"), covering([1, 3, 16], [True, False]))
def test_preemption_at_every_block_size(block_size: int, prefix_caching: bool) -> None:
    prompts = [[*prompt(10), *prompt(1 + 2 * i, seed=i)] for i in range(5)]
    subject = engine(cache_tokens=64, block_size=block_size, max_batched_tokens=8, prefix_caching=prefix_caching)
    found = run(subject, prompts, greedy(max_tokens=25))
    assert subject.scheduler.statistics.preemptions > 0
    for request in found:
        assert_greedy("yoco_u", request, new=25)


@pytest.mark.parametrize(("variant", "chunk"), covering([*PRESETS, "experts", "window 1", "four kinds"], [1, 5, WINDOW + 1]))
def test_prompt_logprobs(variant: str, chunk: int) -> None:
    ids = prompt(19)
    subject = engine(variant, max_batched_tokens=chunk, max_num_seqs=1)
    for _ in range(2):  # prefix-cached the second time, which does not matter
        [request] = run(subject, [ids], greedy(prompt_logprobs=2, max_tokens=3))
        check_prompt_logprobs(request, variant)
        assert output(request) == generated(variant, ids, 3)
        assert request.cached_tokens == 0


def test_prompt_logprobs_among_others() -> None:
    """Of some requests in a batch, at their own loop counts, of prompts from one token on, with several outputs."""
    lengths, loops = [1, 2, 3, 13, 30], [None, 1, 2, 3, 4]
    prompts = [prompt(length, seed=length) for length in lengths]
    scored = [greedy(prompt_logprobs=2, num_loops=n, n=1 + i % 2) for i, n in enumerate(loops)]
    found = run(engine(max_num_seqs=7, max_batched_tokens=10), [*prompts, *prompts], [*scored, *[greedy()] * 5])
    for request, n in zip(found[:5], loops, strict=True):
        check_prompt_logprobs(request, "yoco_u", n)
        for completion in request.outputs:
            assert completion.token_ids == generated("yoco_u", request.prompt_token_ids, loops=n)
    for request in found[5:]:
        assert request.prompt_logprobs is None


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "yoco_retention"])
def test_prompt_logprobs_of_requests_that_give_way(variant: str) -> None:
    """Driven out while decoding and in the middle of the prompt; every position is reported once."""
    subject = engine(variant, cache_tokens=64, max_num_seqs=6, max_batched_tokens=6)
    prompts = [prompt(8 + i, seed=i) for i in range(6)]
    found = run(subject, prompts, greedy(max_tokens=22, prompt_logprobs=2))
    assert subject.scheduler.statistics.preemptions > 1
    for request in found:
        check_prompt_logprobs(request, variant)
        assert_greedy(variant, request, new=22)


@pytest.mark.parametrize("variant", PRESETS)
def test_several_outputs_share_their_prompt(variant: str) -> None:
    params = SamplingParams(n=4, max_tokens=9, seed=3, prompt_logprobs=2, ignore_eos=True)
    ids = prompt(26)
    subject = engine(variant, max_batched_tokens=10)
    [request] = run(subject, [ids], params)
    assert [one.cached_tokens for one in request.outputs] == [0, 24, 24, 24]
    assert request.cached_tokens == 3 * 24
    assert [completion.index for completion in request.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in request.outputs}) == 4
    check_prompt_logprobs(request, variant)
    [separate] = run(engine(variant, prefix_caching=False), [ids], params)
    assert separate.cached_tokens == 0
    assert [one.token_ids for one in separate.outputs] == [one.token_ids for one in request.outputs]


def test_several_outputs_of_several_requests_on_a_small_cache() -> None:
    subject = engine(cache_tokens=72, max_num_seqs=3, max_batched_tokens=6)
    params = [SamplingParams(n=1 + i % 3, max_tokens=14, seed=i, ignore_eos=True) for i in range(5)]
    prompts = [prompt(3 + 4 * i, seed=i) for i in range(5)]
    found = run(subject, prompts, params)
    assert subject.scheduler.statistics.preemptions > 0
    for ids, own, request in zip(prompts, params, found, strict=True):
        [alone] = run(engine(max_num_seqs=1), [ids], own)
        assert [one.token_ids for one in alone.outputs] == [one.token_ids for one in request.outputs]


def first_of_several(subject: Engine) -> RequestOutput:
    return subject.add(prompt(26), SamplingParams(n=3, max_tokens=9, seed=3, ignore_eos=True))


@pytest.mark.parametrize("steps", range(8))
def test_several_outputs_end_together_when_aborted(steps: int) -> None:
    """Also while the later ones wait for the first to compute their prompt."""
    subject = engine(max_batched_tokens=8)
    other = subject.add(prompt(5, seed=2), greedy())
    request = first_of_several(subject)
    for _ in range(steps):
        subject.step()
    subject.abort(request)
    assert {completion.finish_reason for completion in request.outputs} == {"abort"}
    assert subject.unfinished == 1
    while subject.unfinished:
        subject.step()
    assert output(other) == generated("yoco_u", prompt(5, seed=2))
    assert_all_free(subject)
