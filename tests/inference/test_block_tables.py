"""The block tables of seats: what requests hold, on the host and on the device."""

import numpy as np
import torch
from engine_runs import engine, generated, greedy, prompt, run
from hypothesis import given
from hypothesis import strategies as st

from yoco_u.inference import SamplingParams
from yoco_u.inference.block_tables import BlockTables
from yoco_u.inference.request import Request

SEATS, BLOCKS = 3, 12
growth = st.lists(st.tuples(st.integers(0, SEATS - 1), st.integers(1, 4), st.booleans(), st.booleans()), max_size=30)


@given(growth)
def test_the_copy_on_the_device_follows_the_requests(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Requests grow, and give their seats to others, between uploads; on a CPU a second tensor stands for the device's."""
    tables = BlockTables(SEATS, BLOCKS, torch.device("cpu"))
    tables.on_device = torch.zeros_like(tables.host)
    draw = np.random.default_rng(0)
    held = [_request(0, seat) for seat in range(SEATS)]
    for number, (seat, count, leaves, uploads) in enumerate(steps):
        if leaves or len(held[seat].blocks) + count > BLOCKS:
            held[seat] = _request(number + 1, seat)
        held[seat].blocks += draw.integers(1, 1000, count).tolist()
        assert tables.of(held[seat]).tolist() == held[seat].blocks
        if uploads:
            tables.flush()
            for one in held:
                assert tables.on_device[one.seat, : len(one.blocks)].tolist() == one.blocks


def test_an_engine_on_a_cpu_notes_nothing_for_a_device() -> None:
    subject = engine()
    run(subject, [prompt(30, seed=seed) for seed in range(6)], greedy())
    assert subject.runner.tables.on_device is subject.runner.tables.host
    assert not subject.runner.tables._new


def test_an_id_that_is_used_again_is_another_request() -> None:
    """In the same seat; what the first one left in the prefix cache stays what it was."""
    prompts = [prompt(30, seed=1), prompt(30, seed=2), prompt(30, seed=1)]
    for prefix_caching in (True, False):
        subject = engine(prefix_caching=prefix_caching, block_size=8)
        for ids in prompts:
            request = subject.add(ids, greedy(), request_id="again")
            while subject.unfinished:
                subject.step()
            assert request.outputs[0].token_ids == generated("yoco_u", ids)


def _request(allocation: int, seat: int) -> Request:
    """One of an id that others have too."""
    found = Request("1", [1], SamplingParams(), 1)
    found.allocation, found.seat = allocation, seat
    return found
