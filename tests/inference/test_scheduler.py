"""The policy, case by case; `test_scheduler_properties.py` has the random traffic."""

import re

import pytest
from fake_model import END, SNAPSHOT_BYTES, FakeEngine, formula, new_request

from yoco_u.errors import UserError
from yoco_u.inference import scheduler as scheduler_module
from yoco_u.inference.request import Status
from yoco_u.inference.scheduler import Scheduler
from yoco_u.inference.snapshots import SnapshotStore

SETTINGS = {
    "num_blocks": 32,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_batched_tokens": 16,
    "max_model_len": 100,
    "prefix_caching": True,
    "snapshot_bytes": 100 * SNAPSHOT_BYTES,
    "has_window_state": False,
}


def engine(**changes) -> FakeEngine:
    return FakeEngine(**SETTINGS | changes)


def long_output(prompt: list[int], count: int, window: bool = False) -> list[int]:
    """A prompt that begins with `prompt` and whose output is not ended by the end token before `count` tokens."""
    while END in formula(tuple(prompt), 1, count, window)[0]:
        prompt = [*prompt[:-1], prompt[-1] + 1]
    return prompt


def counts(step) -> dict[str, int]:
    return {chunk.request.id: chunk.count for chunk in step.chunks}


def test_tokens_across_prompt_and_output():
    request = new_request("a", [1, 2, 3])
    request.output += [4, 5]
    assert request.tokens == [1, 2, 3, 4, 5] and request.num_tokens == 5
    for start in range(6):
        for stop in range(start, 7):
            assert request.token_slice(start, stop) == request.tokens[start:stop]


def test_refusals_name_the_numbers():
    scheduler = Scheduler(**SETTINGS | {"num_blocks": 10})
    cases = [
        (new_request("long", [1] * 90, 20), "90 prompt tokens and max_tokens 20 make 110, more than max_model_len 100"),
        (
            new_request("wide", [1] * 33, 8),
            "33 prompt tokens and max_tokens 8 need 11 blocks of 4 tokens, but the cache has 10",
        ),
        (new_request("none", []), "the prompt is empty"),
    ]
    for request, message in cases:
        with pytest.raises(UserError, match=f"^request {request.id}: {re.escape(message)}"):
            scheduler.add(request)
    scheduler.add(new_request("fits", [1] * 32, 8))
    with pytest.raises(UserError, match="request fits: a request of this id is not finished yet"):
        scheduler.add(new_request("fits", [1]))
    assert [request.id for request in scheduler.waiting] == ["fits"]
    with pytest.raises(UserError, match="max_batched_tokens is 3, but up to 4 requests"):
        Scheduler(**SETTINGS | {"max_batched_tokens": 3})


def test_nothing_to_do_is_an_empty_step():
    step = Scheduler(**SETTINGS).schedule()
    assert (step.chunks, step.restores, step.snapshots, step.preempted) == ([], [], [], [])


def test_the_budget_is_split_evenly_and_what_the_short_ones_leave_goes_to_the_long_ones():
    run = engine(max_num_seqs=5, num_blocks=64, prefix_caching=False)
    run.add(new_request("decoding", long_output([1, 1], 8), 8))
    run.step()
    for name, length in [("long", 40), ("short", 3), ("longer", 60), ("middle", 5)]:
        run.add(new_request(name, [1] * length))
    assert counts(run.step()) == {"decoding": 1, "short": 3, "middle": 4, "long": 4, "longer": 4}
    assert counts(run.step()) == {"decoding": 1, "middle": 1, "short": 1, "long": 7, "longer": 6}
    run.drain()


def test_requests_are_admitted_in_order_and_nobody_passes_the_head():
    run = engine(num_blocks=9, prefix_caching=False)
    run.add(new_request("first", [1] * 15, 2))
    run.add(new_request("large", [1] * 19, 2))  # 5 blocks, and one spare for the first: 6 of the 5 left
    run.add(new_request("small", [1] * 2, 2))
    assert counts(run.step()) == {"first": 15}
    assert [request.id for request in run.scheduler.waiting] == ["large", "small"]
    run.scheduler.abort("large")
    assert "small" in counts(run.step())
    run.drain()


def test_seats_are_given_smallest_first():
    run = engine(num_blocks=64)
    requests = [run.add(new_request(str(number), [1] * 30, 20)) for number in range(6)]
    run.step()
    assert [request.seat for request in requests] == [0, 1, 2, 3, None, None]
    for name in "20":
        run.scheduler.abort(name)
    run.step()
    assert [request.seat for request in requests] == [None, 1, None, 3, 0, 2]


def test_a_head_without_room_is_looked_at_again_only_after_a_change(monkeypatch):
    run = engine(num_blocks=12, prefix_caching=True)
    run.add(new_request("first", long_output([1] * 8, 15), 15))
    run.step()
    run.add(new_request("large", [2] * 40, 4))
    looks = []
    look = run.scheduler._reusable
    monkeypatch.setattr(run.scheduler, "_reusable", lambda request: looks.append(request) or look(request))
    for _ in range(13):
        run.step()
    assert len(looks) == 4, "when it came, and for each of the three blocks that the first one filled"
    run.drain()


def test_each_block_is_hashed_once(monkeypatch):
    calls = []
    chain_hash = scheduler_module.chain_hash
    monkeypatch.setattr(scheduler_module, "chain_hash", lambda *args: calls.append(args) or chain_hash(*args))
    run = engine(num_blocks=12, has_window_state=True)
    old = run.add(new_request("old", long_output([1] * 12, 20, window=True), 20))
    new = run.add(new_request("new", long_output([2] * 12, 20, window=True), 20))
    run.drain()
    assert run.scheduler.statistics.preemptions > 0
    assert len(calls) == len(old.hashes) + len(new.hashes) == 2 * (31 // 4)


def test_whoever_came_last_gives_way_and_comes_back_first():
    run = engine(num_blocks=10, prefix_caching=False)
    prompts = [long_output([number] * 7, 20) for number in (1, 2, 3)]
    requests = [run.add(new_request(str(number), prompt, 20)) for number, prompt in enumerate(prompts)]
    run.add(new_request("later", [1] * 30, 5))
    preempted = []
    while requests[0].status is not Status.FINISHED:
        step = run.step()
        preempted += [request.id for request in step.preempted]
        if step.preempted:
            assert run.scheduler.waiting[0] is step.preempted[-1] and run.scheduler.waiting[-1].id == "later"
            assert step.preempted[-1].output, "nothing sampled is lost"
    assert preempted == ["2", "1"]
    run.drain()
    assert run.scheduler.statistics.preemptions == 2


def test_a_request_comes_with_room_for_its_next_token_and_grows_in_one_piece():
    run = engine(prefix_caching=False)
    requests = [run.add(new_request(str(number), long_output([1] * 8, 20), 20)) for number in range(2)]
    run.step()
    assert [len(request.blocks) for request in requests] == [3, 3]
    for _ in range(12):
        run.step()
    for request in requests:
        assert request.blocks == list(range(request.blocks[0], request.blocks[0] + 5))
    run.drain()


def test_a_request_alone_may_use_the_whole_pool():
    run = engine(num_blocks=5)
    request = run.add(new_request("a", long_output([1] * 4, 16), 16))
    run.add(new_request("b", [2] * 18, 2))
    run.drain()
    assert len(request.output) == 16 and run.scheduler.statistics.preemptions == 0


def test_equal_prefixes_share_blocks_and_are_computed_once():
    run = engine()
    first = run.add(new_request("first", [1] * 9 + [2], 1))
    run.drain()
    second = run.add(new_request("second", [1] * 9 + [3], 8))
    step = run.step()
    assert counts(step) == {"second": 2} and (second.written, second.computed) == (8, 10)
    assert run.scheduler.statistics.prefix_hit_tokens == 8
    third = run.add(new_request("third", [1] * 8, 8))  # its last token is to run, so one block is to share
    run.step()
    assert third.blocks[0] == second.blocks[0] and third.blocks[1] != second.blocks[1]
    run.drain()
    assert first.finish_reason


def test_the_loop_count_is_part_of_the_key():
    run = engine()
    for loops in (1, 2):
        run.add(new_request(f"{loops}", [1] * 9, 1, num_loops=loops))
        assert counts(run.step()) == {f"{loops}": 9}
    run.add(new_request("again", [1] * 9, 1, num_loops=2))
    assert counts(run.step()) == {"again": 1}
    run.drain()


def test_prompt_logprobs_run_every_position():
    run = engine()
    run.add(new_request("first", [1] * 9, 1))
    run.drain()
    request = run.add(new_request("scored", [1] * 9, 2, prompt_logprobs=0))
    assert counts(run.step()) == {"scored": 9} and request.written == 0
    run.drain()


def test_what_comes_before_the_scores_is_shared():
    run = engine(has_window_state=True)
    context = [1] * 10
    first = run.add(new_request("first", [*context, 2, 1], 0, prompt_logprobs=0, start=10))
    assert counts(run.step()) == {"first": 8} and first.snapshot_at == (0, 8)  # the block before the first score ends here
    assert counts(run.step()) == {"first": 3}  # not the last token: nothing is sampled after it
    assert first.finish_reason == "length" and first.output == []
    run.add(new_request("second", [*context, 1, 2, 2], 0, prompt_logprobs=0, start=10))
    assert counts(run.step()) == {"second": 4}
    run.drain()


def test_a_prompt_that_is_only_computed():
    run = engine(has_window_state=True)
    run.add(new_request("prefix", [1] * 9, 0))
    assert counts(run.step()) == {"prefix": 8}
    run.add(new_request("longer", [*[1] * 9, 2, 2], 1))
    assert counts(run.step()) == {"longer": 3}
    run.drain()


def test_a_prompt_that_fills_the_cache_and_samples_nothing():
    run = engine(num_blocks=2)
    run.add(new_request("all", [1] * 8, 0, prompt_logprobs=0))
    assert counts(run.step()) == {"all": 7}
    run.drain()


def test_without_prefix_caching_nothing_is_kept():
    run = engine(prefix_caching=False, has_window_state=True)
    for name in "ab":
        run.add(new_request(name, [1] * 9, 1))
        step = run.step()
        assert counts(step) == {name: 9} and not step.snapshots
    assert run.scheduler.statistics.cached_blocks == 0
    run.drain()


def test_a_window_state_is_kept_where_the_prompt_ends_and_where_others_branch_off():
    run = engine(has_window_state=True)
    prefix = [1] * 8
    run.add(new_request("first", [*prefix, *[1] * 6], 1))
    first = [run.step(), run.step()]
    assert [counts(step) for step in first] == [{"first": 12}, {"first": 2}], "cut at its last block boundary"
    assert [len(step.snapshots) for step in first] == [1, 0]

    second = run.add(new_request("second", [*prefix, *[2] * 6], 1))
    steps = [run.step(), run.step(), run.step()]
    assert [counts(step)["second"] for step in steps] == [8, 4, 2], (
        "computed again, and cut where it leaves the first one's prompt"
    )
    assert [len(step.snapshots) for step in steps] == [1, 1, 0] and not steps[0].restores
    assert run.scheduler.statistics.prefix_hit_tokens == 0

    third = run.add(new_request("third", [*prefix, *[3] * 3], 4))
    step = run.step()
    assert counts(step) == {"third": 3} and [request for request, _ in step.restores] == [third]
    assert run.scheduler.statistics.prefix_hit_tokens == 8
    run.drain()
    assert second.finish_reason


def test_a_request_without_a_snapshot_shares_the_blocks_and_computes_the_window_again():
    run = engine(has_window_state=True, snapshot_bytes=0)
    run.add(new_request("first", [1] * 14, 1))
    assert counts(run.step()) == {"first": 14}, "no snapshots, so no cuts"
    second = run.add(new_request("second", [1] * 14, 1))
    step = run.scheduler.schedule()
    assert counts(step) == {"second": 14} and (second.written, step.chunks[0].start) == (12, 0)
    run.run(step)
    run.scheduler.finish(second, "abort")
    run.drain()


def test_while_decoding_the_newest_block_boundary_replaces_the_one_before():
    run = engine(has_window_state=True)
    request = run.add(new_request("a", long_output([1] * 6, 20, window=True), 20))
    run.drain()
    kept = [index for index, key in enumerate(request.hashes, 1) if key in run.scheduler.snapshots]
    assert kept == [1, 6], "after 4 tokens of the prompt and after 24 of the 25 computed"
    follow_up = run.add(new_request("b", [*request.tokens, 1], 1))
    step = run.step()
    assert counts(step) == {"b": 3} and step.restores[0][0] is follow_up
    run.drain()


def test_a_prompt_that_ends_on_a_block_boundary_is_kept_to_its_end():
    run = engine(has_window_state=True)
    request = run.add(new_request("a", [1] * 8, 1))
    run.drain()
    assert [key in run.scheduler.snapshots for key in request.hashes] == [True, True]
    run.add(new_request("b", [1] * 10, 1))
    assert counts(run.step()) == {"b": 2}
    run.drain()


def test_a_failed_request_leaves_nothing_to_share():
    run = engine(has_window_state=True)
    request = run.add(new_request("nan", [1] * 14, 4))
    run.step()
    run.step(fail=request)
    assert (request.status, request.finish_reason) == (Status.FINISHED, "error")
    assert run.scheduler.statistics.cached_blocks == 0 and len(run.scheduler.snapshots) == 0
    run.add(new_request("next", [1] * 14, 4))
    assert counts(run.step()) == {"next": 12}
    run.drain()


def test_abort_of_whoever_waits_runs_or_is_unknown():
    run = engine(max_num_seqs=1)
    running, waiting = (run.add(new_request(name, [1] * 30, 4)) for name in "ab")
    run.step()
    assert run.scheduler.abort("c") is None
    assert run.scheduler.abort("b") is waiting and not run.scheduler.waiting
    assert run.scheduler.abort("a") is running and not run.scheduler.running
    assert running.finish_reason == waiting.finish_reason == "abort"
    assert run.scheduler.pool.num_available == 32
    with pytest.raises(AssertionError, match="request a is finished already"):
        run.scheduler.finish(running, "stop")
    run.add(new_request("a", [1], 1))  # the id is free again
    run.drain()


def test_a_request_can_be_aborted_while_its_step_runs():
    run = engine()
    request = run.add(new_request("a", [1] * 9, 4))
    run.step(abort_scheduled=request)
    assert request.computed == 0 and run.scheduler.statistics.cached_blocks == 0
    with pytest.raises(AssertionError, match="request a is not running"):
        run.scheduler.append(request, 1)
    run.drain()


def test_a_request_beyond_its_max_tokens_is_noticed():
    run = engine()
    request = run.add(new_request("a", [1], 1))
    run.scheduler.advance(run.scheduler.schedule())
    run.scheduler.append(request, 1)
    with pytest.raises(AssertionError, match="request a should have been finished"):
        run.scheduler.append(request, 1)


def test_blocks_of_drafts_that_were_wrong_go_to_those_who_need_them():
    """One request has blocks for drafts and waits, the other grows into them; nobody gives way."""
    scheduler = Scheduler(**SETTINGS | {"num_blocks": 12, "block_size": 1})
    waiting, growing = new_request("a", [1, 1], 8), new_request("b", [2, 2], 8)
    for request in (waiting, growing):
        scheduler.add(request)
    scheduler.advance(scheduler.schedule())
    for request in (waiting, growing):
        scheduler.append(request, 1)
    step = scheduler.schedule()
    assert scheduler.add_drafts(step, step.chunks[0], 8) == 4  # one block for each request stays free
    scheduler.advance(step)
    for _ in range(4):
        scheduler.append(growing, 1)
        step = scheduler.schedule()
        scheduler.advance(step)
    assert not step.preempted and growing.computed == 7 and len(waiting.blocks) == 4
    assert not set(waiting.blocks) & set(growing.blocks)
    scheduler.pool.check()


def test_drafts_keep_to_what_is_left():
    """Of the token budget, of the output, and of the block where snapshots are kept."""
    cases = [({}, 8, 8), ({"max_batched_tokens": 4}, 8, 3), ({"has_window_state": True}, 8, 1)]
    for changes, wanted, room in cases:
        scheduler = Scheduler(**SETTINGS | changes)
        request = new_request("a", [1, 2], 20)
        scheduler.add(request)
        scheduler.advance(scheduler.schedule())
        scheduler.append(request, 1)
        step = scheduler.schedule()
        assert scheduler.add_drafts(step, step.chunks[0], wanted) == room
    request.output += [1] * 17
    assert scheduler.add_drafts(step, step.chunks[0], wanted) == 1


def test_snapshots_stay_within_their_budget_and_the_least_recently_used_goes():
    store = SnapshotStore(100)
    store.keep(b"a", "A", 40)
    store.keep(b"b", "B", 40)
    assert store.use(b"a") == "A"
    store.keep(b"c", "C", 50)
    assert b"b" not in store and b"a" in store and store.bytes == 90
    store.keep(b"large", "L", 101)
    assert b"large" not in store and len(store) == 2
    store.keep(b"a", "A2", 50)
    assert store.use(b"a") == "A2" and store.bytes == 100
    store.discard(b"a")
    store.discard(b"a")
    assert store.bytes == 50 and len(store) == 1
