"""The engine against `generate()` and the direct formulas, token for token: architectures, chunks, blocks, loops, batches."""

import pytest
import torch
from engine_runs import (
    NEW,
    VARIANTS,
    WINDOW,
    assert_greedy,
    chosen_logprobs,
    direct_logprobs,
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

LENGTHS = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 29]
CHUNKS = [1, WINDOW - 1, WINDOW + 1, 2 * WINDOW, 200]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_generates_what_generate_does(variant: str) -> None:
    """Of the shortest and the longest prompt; those between are held against one pass over the whole text."""
    found = run(engine(variant), [prompt(length, seed=length) for length in LENGTHS], greedy())
    for request in (found[0], found[-1]):
        assert output(request) == generated(variant, request.prompt_token_ids)
    for request in found[1:-1]:
        assert_greedy(variant, request)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_are_those_of_the_direct_formulas(variant: str) -> None:
    """In float32 against float64: within 1e-4; against one pass over the whole text in float32: within 2e-5."""
    ids = prompt(WINDOW + 1)
    [request] = run(engine(variant, max_batched_tokens=7), [ids], greedy(logprobs=0, max_tokens=5))
    text = ids + output(request)
    chosen = chosen_logprobs(request.outputs[0])
    for truth, tolerance in ((direct_logprobs(variant, text), 1e-4), (full_logprobs(variant, text), 2e-5)):
        assert truth[WINDOW:-1].argmax(-1).tolist() == output(request)
        expected = truth[WINDOW:-1].gather(-1, torch.tensor(output(request))[:, None])[:, 0]
        torch.testing.assert_close(chosen, expected, rtol=0, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize(
    ("variant", "chunk"), covering([*PRESETS, "window 1", "window beyond the context", "experts", "four kinds"], CHUNKS)
)
def test_every_chunk_size(variant: str, chunk: int) -> None:
    """One request at a time, so that every chunk but the last has exactly that size."""
    for length in (WINDOW + 1, 29):
        [request] = run(engine(variant, max_batched_tokens=chunk, max_num_seqs=1), [prompt(length)], greedy(max_tokens=3))
        assert_greedy(variant, request, new=3)


@pytest.mark.parametrize(("variant", "block_size"), covering(PRESETS, [1, 3, 16]))
def test_every_block_size(variant: str, block_size: int) -> None:
    prompts = [prompt(length, seed=length) for length in (3, 16, 17, 30)]
    for request in run(engine(variant, block_size=block_size, max_batched_tokens=10), prompts, greedy()):
        assert_greedy(variant, request)


@pytest.mark.parametrize(
    ("variant", "chunk"), covering([*PRESETS, "gated", "gated upper loop", "experts", "window 1", "four kinds"], [6, 64])
)
def test_loop_counts_of_one_batch(variant: str, chunk: int) -> None:
    """1, 2 and 3 of a model trained with 2 or 3, and more than it knows; some of the same prompt."""
    loops = [1, 2, 3, 4, None, 2]
    prompts = [prompt(9 + 3 * (i // 2), seed=i // 2) for i in range(len(loops))]
    found = run(engine(variant, max_num_seqs=6, max_batched_tokens=chunk), prompts, [greedy(num_loops=n) for n in loops])
    for request, n in zip(found, loops, strict=True):
        assert_greedy(variant, request, n)
        assert request.num_loops == (n or max(stage.loops for stage in engine(variant).architecture.stages))


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "upper_loop", "yoco"])
def test_the_engines_own_loop_count(variant: str) -> None:
    ids = prompt(19)
    found = run(engine(variant, num_loops=5), [ids, ids], [greedy(), greedy(num_loops=2)])
    assert [output(request) for request in found] == [generated(variant, ids, loops=n) for n in (5, 2)]


def test_more_loops_while_others_run() -> None:
    """The caches grow under running requests, which see nothing of it."""
    subject = engine(max_batched_tokens=8)
    first = subject.add(prompt(30), greedy())
    for _ in range(6):
        subject.step()
    before = subject.cache.nbytes
    second = run(subject, [prompt(12, seed=2)], greedy(num_loops=6))[0]
    assert subject.cache.nbytes > before
    assert output(first) == generated("yoco_u", prompt(30))
    assert output(second) == generated("yoco_u", prompt(12, seed=2), loops=6)


@pytest.mark.parametrize("variant", PRESETS)
def test_a_crowd_against_each_alone(variant: str) -> None:
    """More requests than seats, with log-probabilities within 2e-5 of those of the request alone."""
    prompts = [prompt(1 + 7 * i % 33, seed=i) for i in range(9)]
    params = [greedy(logprobs=0, max_tokens=1 + 5 * i % NEW) for i in range(9)]
    together = run(engine(variant, max_num_seqs=5, max_batched_tokens=11), prompts, params)
    for ids, own, request in zip(prompts, params, together, strict=True):
        [alone] = run(engine(variant, max_num_seqs=1, max_batched_tokens=500, prefix_caching=False), [ids], own)
        assert output(request) == output(alone)
        torch.testing.assert_close(chosen_logprobs(request.outputs[0]), chosen_logprobs(alone.outputs[0]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["yoco_u", "universal_transformer", "yoco_retention", "parscale"])
def test_requests_that_come_one_by_one(variant: str) -> None:
    """Prompts and outputs share steps at every phase of each other."""
    subject = engine(variant, max_batched_tokens=9)
    prompts = [prompt(2 + 5 * i % 23, seed=i) for i in range(8)]
    requests = []
    for i, ids in enumerate(prompts):
        requests.append(subject.add(ids, greedy()))
        for _ in range(i % 4):
            subject.step()
    while subject.unfinished:
        subject.step()
    for request in requests:
        assert_greedy(variant, request)


@pytest.mark.parametrize("name", ["sliding_attention", "attend"])
def test_attention_of_other_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks through torch's fused attention, as where there is no blockwise one."""
    from yoco_u.inference.kernels import direct

    calls = []
    original = getattr(direct, name)
    monkeypatch.setattr(direct, "runs_blockwise", lambda tokens, device: False)
    monkeypatch.setattr(direct, name, lambda *args: calls.append(1) or original(*args))
    for variant in ("yoco_u", "rins", "parscale"):
        ids = prompt(37)
        [request] = run(engine(variant, max_batched_tokens=10), [ids], greedy())
        assert output(request) == generated(variant, ids)
    assert calls
