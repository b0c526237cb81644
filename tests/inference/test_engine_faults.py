"""Aborts, full pools, requests that are not possible, and numbers that are none: each stays with the request it belongs to."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from engine_runs import NEW, assert_all_free, engine, generated, greedy, output, prompt, run
from examples import covering
from models import PRESETS, build

from yoco_u import Stage, YocoUConfig
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams


def engine_that_breaks(variant: str, token: int, **settings: Any) -> Engine:
    """An engine for whose model one token's embedding is not a number."""
    chosen = {"dtype": "float32", "cache_tokens": 512, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 16} | settings
    broken = build(engine(variant).architecture)
    assert not broken.config.tie_word_embeddings
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = torch.nan
    return Engine(broken, None, EngineSettings(**chosen))


def without(token: int, ids: list[int]) -> list[int]:
    return [one for one in ids if one != token]


@pytest.mark.parametrize(("steps", "variant"), covering(range(13), ["yoco_u", "rins", "yoco_retention"]))
def test_abort_at_every_point(variant: str, steps: int) -> None:
    """While waiting, after each chunk of a prompt of five, while decoding."""
    subject = engine(variant, max_num_seqs=2, max_batched_tokens=6, cache_tokens=128)
    requests = [subject.add(prompt(20, seed=seed), greedy()) for seed in (1, 2, 3)]
    for _ in range(steps):
        subject.step()
    aborted = requests[steps % 3]
    so_far = list(output(aborted))
    subject.abort(aborted)
    assert aborted.finished and aborted.outputs[0].finish_reason == "abort" and output(aborted) == so_far
    assert subject.unfinished == 2
    subject.abort(aborted)  # a second time changes nothing
    while subject.unfinished:
        subject.step()
    assert_all_free(subject)
    assert output(aborted) == so_far == generated(variant, aborted.prompt_token_ids)[: len(so_far)]
    for request in requests:
        if request is not aborted:
            assert output(request) == generated(variant, request.prompt_token_ids)
            subject.abort(request)
            assert request.outputs[0].finish_reason == "length"


def test_abort_of_everything() -> None:
    subject = engine(max_num_seqs=2)
    requests = [subject.add(prompt(20, seed=seed), greedy()) for seed in range(5)]
    for _ in range(5):
        subject.step()
    for request in requests:
        subject.abort(request)
    assert_all_free(subject)
    assert subject.step() == []
    assert output(run(subject, [prompt(9)], greedy())[0]) == generated("yoco_u", prompt(9))


def test_a_full_pool_queues() -> None:
    """Room for one request at a time, in the order of arrival."""
    subject = engine(cache_tokens=32, max_num_seqs=4)
    requests = [subject.add(prompt(18, seed=seed), greedy()) for seed in range(4)]
    finished: list[RequestOutput] = []
    while subject.unfinished:
        assert len(subject.scheduler.running) <= 1
        finished += [update.request for update in subject.step() if update.finish_reason]
    assert finished == requests
    assert [output(request) for request in requests] == [generated("yoco_u", prompt(18, seed=seed)) for seed in range(4)]
    assert_all_free(subject)


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        (prompt(60), {"max_tokens": 5}, "60 prompt tokens and max_tokens 5 make 65, more than max_model_len 64"),
        ([], {}, "the prompt is empty"),
        ("", {}, "no tokenizer"),
        ("text", {}, "no tokenizer"),
        ([3, 96, 4], {}, "token 96 of the prompt is not in the vocabulary of 96"),
        ([3, -1, 4], {}, "token -1 of the prompt is not in the vocabulary of 96"),
        ([3, 1.5, 4], {}, "token 1.5 of the prompt is no whole number"),
        ([3], {"stop": "x"}, "need a tokenizer"),
        ([3], {"regex": "x"}, "need a tokenizer"),
        ([3], {"num_loops": 256}, "loops need [0-9]+ MiB, [0-9]+ more than are allocated, but [0-9]+ MiB are free"),
        ([3], {"num_loops": 256, "n": 3}, "lower cache_tokens, max_num_seqs or num_loops"),
    ],
)
def test_requests_that_are_not_possible(
    ids: Any, params: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = engine(cache_tokens=64)
    monkeypatch.setattr("yoco_u.inference.model_limits.free_memory_bytes", lambda _: 2**18)
    running = subject.add(prompt(9), greedy())
    subject.step()
    allocated = subject.cache.nbytes
    with pytest.raises(UserError, match=message):
        subject.add(ids, SamplingParams(**params))
    assert subject.unfinished == 1 and subject.cache.nbytes == allocated
    while subject.unfinished:
        subject.step()
    assert output(running) == generated("yoco_u", prompt(9))
    assert_all_free(subject)


def test_longer_than_the_model_may() -> None:
    subject = engine(max_model_len=30)
    assert output(run(subject, [prompt(22)], greedy())[0]) == generated("yoco_u", prompt(22))
    with pytest.raises(UserError, match="make 31, more than max_model_len 30"):
        subject.add(prompt(23), greedy())
    with pytest.raises(UserError, match="make 18, more than max_model_len 16"):
        engine(cache_tokens=14).add(prompt(9), SamplingParams(max_tokens=9))  # 14 tokens are 4 blocks


def test_names_that_are_taken() -> None:
    subject = engine()
    first = subject.add(prompt(9), greedy(n=3), request_id="1")
    for name, several in (("1", 1), ("1", 2), ("1.2", 1)):
        with pytest.raises(UserError, match=f"request {name}: a request of this id is not finished"):
            subject.add(prompt(9), greedy(n=several), request_id=name)
    second = subject.add(prompt(9), greedy())
    assert (first.id, second.id) == ("1", "2")
    assert subject.unfinished == 4
    while subject.unfinished:
        subject.step()
    assert {tuple(one.token_ids) for one in (*first.outputs, *second.outputs)} == {tuple(generated("yoco_u", prompt(9)))}
    assert subject.add(prompt(9), greedy(), request_id="1").id == "1"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("variant", "allocation"), [("yoco_u", 0), ("yoco_u", 3), ("universal_transformer", 2), ("four kinds", 1)]
)
def test_caches_that_cannot_be_allocated_leave_nothing_behind(
    variant: str, allocation: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever allocation fails of several."""
    subject = engine(variant)
    first = subject.add(prompt(9), greedy())
    left, storage, allocated = allocation, subject.cache._storage, subject.cache.nbytes

    def fail(*shape: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        return storage(*shape)

    with monkeypatch.context() as patch:
        patch.setattr(subject.cache, "_storage", fail)
        with pytest.raises((UserError, KeyboardInterrupt)) as found:
            subject.add(prompt(9), greedy(num_loops=7, n=2), request_id="more")
    assert left == -1 and subject.cache.nbytes == allocated
    if isinstance(error, RuntimeError):
        assert "caches of 7 loops cannot be allocated (CUDA out of memory); lower num_loops" in str(found.value)
    again = subject.add(prompt(9), greedy(), request_id="more")
    while subject.unfinished:
        subject.step()
    assert first.outputs[0].token_ids == again.outputs[0].token_ids == generated(variant, prompt(9))


@pytest.mark.parametrize("settings", [{"max_num_seqs": 2**20, "max_batched_tokens": 2**20, "cache_tokens": 2**21}])
def test_block_tables_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"need \d+ MiB, .* MiB are free; lower cache_tokens, max_num_seqs"):
        engine("transformer", **settings)


# What a step calls that is of no single request, in the order in which it does.
STEP: list[Callable[[Engine], tuple[Any, str]]] = [
    lambda subject: (subject.runner, "begin"),
    lambda subject: (subject.speculation, "draft"),
    lambda subject: (subject.runner.model.lm_head, "forward"),
    lambda subject: (subject.runner, "window_state"),
    lambda subject: (subject.scheduler, "advance"),
    lambda subject: (subject.speculation, "accept"),
    lambda subject: (subject.speculation, "settle"),
]


@pytest.mark.parametrize(("variant", "place"), covering(["yoco_u", "rins", "yoco_retention"], STEP))
def test_a_step_that_raises_ends_its_own_requests(variant: str, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it does. Those that wait go on, and find caches that nothing half-computed is reused from."""
    subject = engine(variant, max_num_seqs=2)
    owner, name = place(subject)
    if name == "window_state" and not subject.cache.has_window_state:
        pytest.skip("it keeps none")
    requests = [subject.add(prompt(20), greedy()) for _ in range(3)]
    told = subject.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(owner, name, fail)
        for _ in range(20):
            told += subject.step()
    told += subject.failed
    for request in requests[:2]:
        [completion] = request.outputs
        assert (completion.finish_reason, completion.error) == ("error", "RuntimeError: broken")
        own = [update for update in told if update.request is request]
        assert [update.finish_reason for update in own] == [None] * (len(own) - 1) + ["error"]
        assert [token for update in own for token in update.token_ids] == completion.token_ids
    assert requests[2].outputs[0].finish_reason is None
    while subject.unfinished:
        subject.step()
    assert output(requests[2]) == generated(variant, prompt(20))
    assert_all_free(subject)


def test_settings_that_are_not_possible() -> None:
    with pytest.raises(UserError, match="max_batched_tokens is 3, but up to 4 requests"):
        engine(max_batched_tokens=3)
    with pytest.raises(UserError, match="MiB are free; lower cache_tokens"):
        engine("rins", cache_tokens=10**11)
    with pytest.raises(UserError, match="MiB are free; lower cache_tokens"):
        engine(cache_tokens=10**15)
    with pytest.raises(UserError, match="leave no room for a block in 1024 MiB"):
        engine(cache_tokens=None, max_num_seqs=10**6, max_batched_tokens=10**6)


def test_stages_of_different_loop_counts_need_one() -> None:
    stages = (Stage(attention="sliding", layers=1, loops=2), Stage(attention="full", layers=1, loops=3))
    two = engine().architecture.model_copy(update={"stages": stages})
    with pytest.raises(UserError, match="the model's stages loop 2 and 3 times"):
        Engine(build(two), None, EngineSettings(dtype="float32", cache_tokens=64))
    subject = Engine(build(two), None, EngineSettings(dtype="float32", cache_tokens=64, num_loops=2))
    row = torch.tensor([prompt(9)])
    expected = build(two, pad_token_id=0).generate(row, max_new_tokens=NEW, do_sample=False, num_loops=2)[0, 9:].tolist()
    assert output(run(subject, [prompt(9)], greedy())[0]) == expected
    assert isinstance(build(two).config, YocoUConfig)


BAD = 7


@pytest.mark.parametrize(
    ("variant", "chunk"), [*((variant, 5) for variant in (*PRESETS, "experts", "window 1", "four kinds")), ("yoco_u", 64)]
)
def test_a_request_that_breaks_fails_alone(variant: str, chunk: int) -> None:
    """NaN in a prompt of one token, at the beginning, in the middle, at the end of others; among requests that go on."""
    candidates = [prompt(1 + seed % 15, seed) for seed in range(40)]
    good = list(islice((ids for ids in candidates if BAD not in ids + generated(variant, ids, 4)), 5))
    bad = [[BAD], [BAD, *prompt(10)], [*prompt(4), BAD, *prompt(4)], [*prompt(12), BAD], [*prompt(9), BAD, *prompt(9)]]
    subject = engine_that_breaks(variant, BAD, max_batched_tokens=chunk, prefix_caching=False)
    for _ in range(2):  # the second time in seats and blocks that have held what is not a number
        mixed = [ids for pair in zip(bad, good, strict=True) for ids in pair]
        for ids, request in zip(mixed, run(subject, mixed, greedy(max_tokens=4)), strict=True):
            completion = request.outputs[0]
            if BAD in ids:
                assert (completion.finish_reason, completion.token_ids) == ("error", [])
                assert completion.error is not None and "NaN" in completion.error
            else:
                assert completion.finish_reason == "length"
                assert output(request) == generated(variant, ids, 4)


@pytest.mark.parametrize("variant", PRESETS)
def test_what_a_broken_request_computed_is_not_reused(variant: str) -> None:
    subject = engine_that_breaks(variant, BAD)
    start = without(BAD, prompt(18))
    for ids in ([*start, BAD, *prompt(9)], [*start, BAD, *prompt(9)]):
        [broken] = run(subject, [ids], greedy())
        assert (broken.outputs[0].finish_reason, broken.cached_tokens) == ("error", 0)
    [request] = run(subject, [start], greedy(max_tokens=1))
    assert (output(request), request.cached_tokens) == (generated(variant, start, 1), 0)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kernels", ["compiled", "direct"])
def test_no_cache_hides_what_is_not_a_number(kernels: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "direct":
        monkeypatch.setattr("yoco_u.inference.kernels.compiled", lambda: False)
    for variant in ("yoco_u", "yoco", "transformer"):
        subject = engine_that_breaks(variant, BAD, kv_dtype=kv_dtype, max_batched_tokens=5)
        ids = [*prompt(3), BAD, *prompt(20)]
        found = run(subject, [ids, without(BAD, prompt(9)), [BAD]], greedy(max_tokens=2))
        assert [request.outputs[0].finish_reason for request in found] == ["error", "length", "error"]
