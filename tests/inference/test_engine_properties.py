"""Random traffic through real models on tiny caches: whatever finishes is what the request gives alone, and nothing leaks."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from engine_runs import assert_all_free, drafting_engine, engine, full_logprobs, greedy, likeliest, prompt, run
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.inference import RequestOutput, SamplingParams

LONGEST = 44


@dataclass(frozen=True)
class Arrival:
    """A request, how many steps after the one before it comes, and after how many it is aborted, if it is."""

    prefix: int
    tail: int
    max_tokens: int
    loops: int
    outputs: int
    scored: bool
    drafts: str
    threshold: float | None
    after: int
    aborted: int | None

    @property
    def ids(self) -> list[int]:
        return (prompt(20)[: self.prefix] + prompt(8, seed=self.tail)[: self.tail]) or [1]

    @property
    def params(self) -> SamplingParams:
        how: dict[str, Any] = {"num_loops": self.loops, "drafts": self.drafts}
        if self.threshold is not None:
            how = {"num_loops": "auto", "exit_threshold": self.threshold}
        return greedy(max_tokens=self.max_tokens, n=self.outputs, prompt_logprobs=0 if self.scored else None, **how)


arrivals = st.builds(
    Arrival,
    prefix=st.integers(0, 20),
    tail=st.integers(0, 8),
    max_tokens=st.integers(1, 16),
    loops=st.sampled_from([3, 3, 3, 1, 2, 4]),
    outputs=st.sampled_from([1, 1, 1, 2]),
    scored=st.sampled_from([False, False, True]),
    drafts=st.sampled_from(["none", "loops", "prompt"]),
    threshold=st.sampled_from([None, None, 0.19, 0.31, 2.0]),
    after=st.sampled_from([0, 0, 1, 2, 7]),
    aborted=st.sampled_from([None, None, None, 0, 1, 2, 5, 12]),
)
engines = st.fixed_dictionaries(
    {
        "cache_tokens": st.integers(LONGEST, 110),
        "block_size": st.sampled_from([1, 2, 3, 4, 8]),
        "max_num_seqs": st.integers(1, 5),
        "spare": st.sampled_from([0, 1, 3, 7, 8, 9, 40]),
        "prefix_caching": st.sampled_from([True, True, False]),
        "snapshot_bytes": st.sampled_from([0, 20_000, 10**7]),
        "draft_length": st.integers(1, 8),
    }
)
VARIANTS = ["yoco_u", "nearly closed gates", "rins", "yoco_retention", "upper_loop", "upper_loop_without_shared_kv"]


@cache
def leaving_alone(variant: str, ids: tuple[int, ...], threshold: float) -> RequestOutput:
    """What a request gives whose tokens may leave the loop; tests/inference/test_exits.py holds that against a direct twin."""
    subject = engine(variant, max_num_seqs=1, max_batched_tokens=64)
    params = greedy(num_loops="auto", exit_threshold=threshold, max_tokens=16, prompt_logprobs=0)
    return run(subject, [list(ids)], params)[0]


def check(variant: str, arrival: Arrival, request: RequestOutput) -> None:
    alone = None if arrival.threshold is None else leaving_alone(variant, tuple(arrival.ids), arrival.threshold)
    for completion in request.outputs:
        if alone is not None:
            count = len(completion.token_ids)
            assert completion.token_ids == alone.outputs[0].token_ids[:count]
            assert completion.loops == alone.outputs[0].loops[:count]
        else:
            assert completion.token_ids == likeliest(variant, arrival.ids, completion.token_ids, arrival.loops)
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == arrival.max_tokens
        else:
            assert completion.finish_reason == "abort" and arrival.aborted is not None
            assert len(completion.token_ids) <= arrival.max_tokens
    if arrival.scored and request.outputs[0].finish_reason == "length":
        assert request.prompt_logprobs is not None
        reported = torch.tensor([one.chosen.logprob for one in request.prompt_logprobs if one is not None])
        if alone is not None:
            expected_scores = torch.tensor([one.chosen.logprob for one in alone.prompt_logprobs or [] if one is not None])
        else:
            truth = full_logprobs(variant, arrival.ids, arrival.loops)
            expected_scores = truth[:-1].gather(-1, torch.tensor(arrival.ids[1:], dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(reported, expected_scores, rtol=0, atol=2e-5)


@settings(max_examples=examples(20))
@given(variant=st.sampled_from(VARIANTS), chosen=engines, traffic=st.lists(arrivals, min_size=1, max_size=12))
def test_traffic(variant: str, chosen: dict[str, Any], traffic: list[Arrival]) -> None:
    serve(variant, chosen, traffic)


def serve(variant: str, chosen: dict[str, Any], traffic: list[Arrival]) -> None:
    """Let the requests arrive at an engine of these settings, and check all that becomes of them."""
    besides = {"spare", "draft_length"} | (set() if chosen["prefix_caching"] else {"snapshot_bytes"})
    settings = {name: value for name, value in chosen.items() if name not in besides}
    budget = chosen["max_num_seqs"] + chosen["spare"]
    subject = drafting_engine(variant, chosen["draft_length"], max_batched_tokens=budget, **settings)
    requests: list[tuple[Arrival, RequestOutput, int]] = []
    clock = 0

    def step() -> None:
        nonlocal clock
        for arrival, request, came in requests:
            if arrival.aborted is not None and clock >= came + arrival.aborted:
                subject.abort(request)
        subject.step()
        subject.scheduler.pool.check()
        clock += 1

    for arrival in traffic:
        for _ in range(arrival.after):
            step()
        if variant == "yoco_retention":
            arrival = replace(arrival, drafts="none", threshold=None)
        requests.append((arrival, subject.add(arrival.ids, arrival.params), clock))
    for _ in range(10_000):
        if not subject.unfinished:
            break
        step()
    assert_all_free(subject)
    for arrival, request, _ in requests:
        check(variant, arrival, request)


def test_crowds_on_small_caches() -> None:
    """Denser than hypothesis makes them: most give way, share and come back."""
    preemptions = hits = accepted = 0
    for seed in range(6):
        settings = {"cache_tokens": 60, "block_size": 1 + seed % 4, "max_num_seqs": 5, "max_batched_tokens": 6 + seed}
        subject = drafting_engine("nearly closed gates", 3, **settings)
        by, exits = ["loops", "none", "loops", "prompt"], [None, None, None, 0.1, None, 2.0]
        traffic = [
            Arrival(
                *(5 * (i % 5), (seed + 3 * i) % 9, 4 + (5 * i) % 13, 1 + i % 3, 1, i % 5 == 0),
                *(by[i % 4], exits[i % 6], i % 3, None),
            )
            for i in range(14)
        ]
        requests = []
        for arrival in traffic:
            for _ in range(arrival.after):
                subject.step()
            requests.append(subject.add(arrival.ids, arrival.params))
        while subject.unfinished:
            subject.step()
        assert_all_free(subject)
        for arrival, request in zip(traffic, requests, strict=True):
            check("nearly closed gates", arrival, request)
        accepted += subject.speculation.accepted
        preemptions += subject.scheduler.statistics.preemptions
        hits += subject.scheduler.statistics.prefix_hit_tokens
    assert preemptions > 15
    assert accepted > 10
    assert hits > 100
