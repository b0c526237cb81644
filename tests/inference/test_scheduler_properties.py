"""Random traffic on tiny caches: every output equals that of the request run alone, and nothing leaks."""

import random

import pytest
from examples import examples
from fake_model import SNAPSHOT_BYTES, FakeEngine, new_request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from yoco_u.errors import UserError
from yoco_u.inference.request import Request, Status

PREFIXES = [(1, 1, 2, 1, 2, 2, 1, 1, 1, 2, 1, 2), (1, 1, 2, 1, 2, 1, 2, 2, 2, 1)]
MAX_MODEL_LEN = 40
prompts = st.builds(
    lambda prefix, length, tail: [*prefix[:length], *tail],
    st.sampled_from(PREFIXES),
    st.integers(4, 12),
    st.lists(st.integers(1, 2), max_size=6),
).filter(len)
requests = st.tuples(
    prompts, st.integers(0, 16), st.sampled_from([1, 1, 2, 3]), st.sampled_from([None, None, None, 0]), st.integers(0, 12)
)


def check_alone(request: Request, settings: dict) -> None:
    """The same request run alone gives the same output."""
    alone = FakeEngine(**settings)
    same = alone.add(new_request("alone", request.prompt, request.params.max_tokens, request.num_loops))
    alone.drain()
    assert alone.scheduler.statistics.preemptions == 0
    assert (same.output, same.finish_reason) == (request.output, request.finish_reason)


class Traffic(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 20),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.sampled_from([0, 1, 3, 8, 40]),
        prefix_caching=st.sampled_from([True, True, False]),
        snapshots=st.sampled_from([0, 1, 2, 50]),
        window=st.booleans(),
        draft_length=st.sampled_from([0, 0, 1, 3, 8]),
    )
    def start(self, num_blocks, block_size, max_num_seqs, spare_tokens, prefix_caching, snapshots, window, draft_length):
        self.settings = {
            "draft_length": draft_length,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_num_seqs": max_num_seqs,
            "max_batched_tokens": max_num_seqs + spare_tokens,
            "max_model_len": MAX_MODEL_LEN,
            "prefix_caching": prefix_caching,
            "snapshot_bytes": SNAPSHOT_BYTES * snapshots,
            "has_window_state": window,
        }
        self.engine = FakeEngine(**self.settings)

    @rule(burst=st.lists(requests, min_size=1, max_size=6), steps=st.integers(0, 5))
    def add(self, burst, steps):
        room = min(MAX_MODEL_LEN, self.settings["num_blocks"] * self.settings["block_size"])
        for prompt, max_tokens, num_loops, logprobs, start in burst:
            start = start if logprobs is not None else 0
            request = new_request(str(len(self.engine.arrival)), prompt, max_tokens, num_loops, logprobs, start)
            if len(prompt) + max_tokens <= room and len(prompt) > start and (max_tokens or len(prompt) > 1):
                self.engine.add(request)
            else:
                with pytest.raises(UserError):
                    self.engine.add(request)
        self.run_steps(steps)

    @rule(count=st.integers(1, 25))
    def run_steps(self, count):
        for _ in range(count):
            self.engine.step()

    def unfinished(self) -> list[Request]:
        return [request for request in self.engine.arrival if request.status is not Status.FINISHED]

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), when=st.sampled_from(["now", "abort_scheduled", "abort_computed", "fail"]))
    def lose_one(self, data, when):
        request = data.draw(st.sampled_from(self.unfinished()))
        if when == "now":
            assert self.engine.scheduler.abort(request.id) is request
            assert self.engine.scheduler.abort(request.id) is None
            self.engine.check()
        else:
            self.engine.step(**{when: request})

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        for request in self.engine.arrival:
            if request.finish_reason in ("stop", "length"):
                check_alone(request, self.settings)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=examples(50), stateful_step_count=20)


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("snapshots", [0, 2, 40])
def test_crowds_on_a_small_cache_preempt_share_and_restore(window, snapshots):
    """Denser traffic than hypothesis makes: most of these runs preempt and reuse."""
    preemptions = hits = accepted = 0
    for seed in range(30):
        draw = random.Random(seed)
        block_size = draw.randint(1, 3)
        engine = FakeEngine(
            draft_length=[0, 2, 5][seed % 3],
            num_blocks=draw.randint(40, 60) // block_size,
            block_size=block_size,
            max_num_seqs=draw.randint(4, 8),
            max_batched_tokens=draw.randint(8, 20),
            max_model_len=MAX_MODEL_LEN,
            prefix_caching=True,
            snapshot_bytes=SNAPSHOT_BYTES * snapshots,
            has_window_state=window,
        )
        for number in range(25):
            prompt = [*draw.choice(PREFIXES)[: draw.randint(4, 12)], *draw.choices([1, 2], k=draw.randint(0, 6))]
            max_tokens, loops, logprobs = draw.randint(0, 20), draw.choice([1, 1, 2]), draw.choice([None, None, None, 0])
            start = draw.randrange(len(prompt)) if logprobs is not None else 0
            engine.add(new_request(str(number), prompt, max_tokens, loops, logprobs, start))
            for _ in range(draw.randint(0, 3)):
                engine.step()
            if draw.random() < 0.1:
                engine.scheduler.abort(str(draw.randrange(number + 1)))
        engine.drain()
        accepted += engine.accepted
        preemptions += engine.scheduler.statistics.preemptions
        hits += engine.scheduler.statistics.prefix_hit_tokens
    assert preemptions > 50
    assert accepted > 250
    assert (hits > 500) == bool(snapshots or not window)
