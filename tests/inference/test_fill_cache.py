"""`Engine.fill_cache`: requests begin behind tokens that are not computed, and attend to random rows in their place."""

from collections.abc import Sequence

import pytest
import torch
from engine_runs import (
    NEW,
    WINDOW,
    assert_all_free,
    chosen_logprobs,
    drain,
    engine,
    generated,
    greedy,
    model,
    output,
    prompt,
)
from models import PRESETS
from torch import Tensor

from yoco_u.errors import UserError
from yoco_u.inference import Engine, RequestOutput, SamplingParams
from yoco_u.inference.kv_cache import KVStorage
from yoco_u.inference.request import Request
from yoco_u.inference.step import Step
from yoco_u.model.cache import YocoUCache

FILLED = 21
LENGTHS = (FILLED + 1, FILLED + 2, FILLED + 40)  # one token is left to compute, two are, or more than a step computes


def filled(
    subject: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams], seed: int = 0
) -> list[RequestOutput]:
    """Queue requests behind `FILLED` tokens; nothing has run yet."""
    several = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [subject.add(ids, own) for ids, own in zip(prompts, several, strict=True)]
    torch.manual_seed(seed)
    subject.fill_cache(FILLED)
    return requests


def context_of(subject: Engine, request: Request) -> YocoUCache:
    """The filled tokens of a request as the model's own cache holds them, read from the rows of its blocks and its seat."""
    architecture = subject.architecture.with_loops(request.num_loops)
    cache, positions, kept = YocoUCache(architecture), torch.arange(FILLED), subject.cache
    block_size, seat = kept.shape.block_size, request.seat
    assert seat is not None
    pages = torch.tensor(request.blocks)[positions // block_size] * block_size + positions % block_size

    def append(slot: int, storage: KVStorage, rows: Tensor) -> None:
        cache.append(slot, *storage.read(rows, torch.float32))

    owning = [slot for slot in architecture.slots() if slot.attention != "cross"]
    for index, slot in enumerate(owning):
        if slot.attention == "full":
            append(index, kept.pages[slot], pages)
        elif slot.attention == "sliding":  # in front of the window anything may stand: it is not seen
            append(index, kept.rings[slot], seat * kept.rings[slot].block_size + positions % kept.rings[slot].block_size)
        else:
            cache.set_retention_state(index, kept.states[slot][None, seat].clone(), FILLED)
    for number, global_kv in enumerate(kept.global_kvs):
        append(len(owning) + number, global_kv, pages)
    return cache


@torch.no_grad()
def logprobs_behind(variant: str, cache: YocoUCache, ids: list[int], loops: int) -> Tensor:
    """Of every new token, (tokens, vocab), from one pass of the model over all of them."""
    return model(variant)(torch.tensor([ids]), past_key_values=cache, num_loops=loops).logits[0].log_softmax(-1)


def assert_continues(
    variant: str, subject: Engine, prompts: list[list[int]], params: list[SamplingParams], near: float
) -> None:
    """Every request gets the tokens that the model gives behind the rows of that request."""
    requests = filled(subject, prompts, params)
    contexts = [context_of(subject, request) for request in subject.scheduler.running]
    drain(subject)
    for ids, request, context in zip(prompts, requests, contexts, strict=True):
        assert request.finished and len(output(request)) == NEW
        truth = logprobs_behind(variant, context, ids[FILLED:] + output(request)[:-1], request.num_loops)[-NEW:]
        expected = truth.gather(-1, torch.tensor(output(request))[:, None])[:, 0]
        torch.testing.assert_close(chosen_logprobs(request.outputs[0]), expected, rtol=0, atol=near)
        if subject.cache.shape.kind == "float32":
            assert truth.argmax(-1).tolist() == output(request)


@pytest.mark.parametrize("variant", [*PRESETS, "window 1", "window beyond the context", "experts", "four kinds"])
def test_requests_go_on_behind_the_rows_that_were_filled(variant: str) -> None:
    """Several at once, with prompts left of one token and of several steps."""
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    subject = engine(variant, prefix_caching=False)
    assert_continues(variant, subject, prompts, [greedy(logprobs=0)] * len(prompts), near=2e-5)


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "upper_loop", "universal_transformer"])
def test_loop_counts_of_one_batch(variant: str) -> None:
    """Caches of every loop are filled, also those of more loops than the model was trained with."""
    prompts = [prompt(length, seed=length) for length in (*LENGTHS, LENGTHS[0])]
    params = [greedy(num_loops=loops, logprobs=0) for loops in (1, 2, 5, None)]
    assert_continues(variant, engine(variant, prefix_caching=False), prompts, params, near=2e-5)


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "parscale"])
def test_an_int8_cache(variant: str) -> None:
    """The rows are read as they were rounded; what remains is that the new tokens' own keys are rounded too."""
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    subject = engine(variant, prefix_caching=False, kv_dtype="int8")
    assert_continues(variant, subject, prompts, [greedy(logprobs=0)] * len(prompts), near=0.12)


@pytest.mark.parametrize("variant", ["yoco_u", "transformer"])
def test_only_the_tokens_behind_the_context_are_computed(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once, from the first step on."""
    subject = engine(variant, prefix_caching=False)
    steps: list[list[tuple[str, int, int]]] = []
    run = subject.runner.run

    def watched(step: Step) -> list:
        steps.append([(chunk.request.id, chunk.start, chunk.end) for chunk in step.chunks])
        return run(step)

    monkeypatch.setattr(subject.runner, "run", watched)
    requests = filled(subject, [prompt(length) for length in LENGTHS], greedy())
    assert not steps
    assert [request.cached_tokens for request in requests] == [0, 0, 0]
    drain(subject)
    assert sorted(start for _, start, _ in steps[0]) == [FILLED] * len(LENGTHS)
    for length, request in zip(LENGTHS, requests, strict=True):
        ranges = [(start, end) for step in steps for name, start, end in step if name == request.id]
        computed = [position for start, end in ranges for position in range(start, end)]
        assert computed == list(range(FILLED, length + NEW - 1))  # the last new token is not run
        assert request.cached_tokens == FILLED


@pytest.mark.parametrize("variant", ["yoco_u", "yoco", "transformer"])
def test_the_rows_are_drawn_by_torchs_seed(variant: str) -> None:
    def answers(seed: int) -> list[list[int]]:
        subject = engine(variant, prefix_caching=False)
        requests = filled(subject, [prompt(length, seed=length) for length in LENGTHS], greedy(), seed)
        drain(subject)
        return [output(request) for request in requests]

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)


def test_requests_that_come_later_are_computed_whole() -> None:
    subject = engine("yoco_u", prefix_caching=False)
    [first] = filled(subject, [prompt(30)], greedy())
    subject.step()
    later = subject.add(prompt(30), greedy())
    drain(subject)
    assert output(later) == generated("yoco_u", prompt(30)) != output(first)


def test_a_prefix_cache_would_share_the_random_rows() -> None:
    subject = engine("yoco_u")
    request = subject.add(prompt(30), greedy())
    with pytest.raises(UserError, match="set prefix_caching off"):
        subject.fill_cache(FILLED)
    drain(subject)
    assert output(request) == generated("yoco_u", prompt(30))


@pytest.mark.parametrize(
    ("settings", "left"), [({"max_num_seqs": 2}, 2), ({"cache_tokens": 80, "max_num_seqs": 4}, 2)], ids=["seats", "blocks"]
)
def test_all_requests_must_run_at_once(settings: dict[str, int], left: int) -> None:
    subject = engine("yoco_u", prefix_caching=False, **settings)
    requests = [subject.add(prompt(WINDOW + FILLED), greedy(max_tokens=3)) for _ in range(4)]
    with pytest.raises(UserError, match=f"{left} requests cannot run beside the others; enlarge the caches"):
        subject.fill_cache(FILLED)
    for request in requests:
        subject.abort(request)
    assert_all_free(subject)


def test_a_prompt_must_be_longer_than_what_is_filled() -> None:
    subject = engine(prefix_caching=False)
    subject.add(prompt(9), greedy())
    for tokens in (9, 20, -1):
        with pytest.raises(UserError, match="leave one to compute"):
            subject.fill_cache(tokens)
    subject.fill_cache(8)
