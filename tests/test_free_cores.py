"""The number of threads follows what other programs leave, on a machine that is simulated."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yoco_u import free_cores
from yoco_u.free_cores import FreeCores


class Machine:
    """A clock, and the CPU time that all programs and this process have used."""

    def __init__(self) -> None:
        self.now = self.of_all = self.own = 0.0

    def run(self, seconds: float, others: float, own: float) -> None:
        self.now += seconds
        self.of_all += (others + own) * seconds
        self.own += own * seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Machine()


def follower(machine: Machine, cores: int, most: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> FreeCores:
    monkeypatch.setattr(free_cores, "_cores", lambda: list(range(cores)))
    threads = [most]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    return FreeCores(clock=lambda: machine.now, used=lambda: (machine.of_all, machine.own), **settings)


def test_one_thread_less_for_each_busy_program(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(machine, 4, 4, monkeypatch).follow
    for others, expected in [(0, 4), (0.3, 4), (1, 3), (1.2, 3), (2, 2), (3, 1), (4, 1), (9, 1), (1, 3), (0, 4)]:
        machine.run(0.3, others, own=4 - min(others, 4))
        follow()
        assert torch.get_num_threads() == expected, others


def test_cores_to_spare_go_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(machine, 8, 4, monkeypatch).follow
    for others, expected in [(4, 4), (5, 3), (0, 4)]:
        machine.run(1.0, others, own=3)
        follow()
        assert torch.get_num_threads() == expected


def test_numbers_that_are_halved_are_few(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(machine, 16, 12, monkeypatch, seconds=1.0, stale=1e9, halving=True).follow
    for others, expected in [(0, 12), (4, 12), (5, 6), (9, 6), (11, 3), (13, 3), (14, 1), (99, 1), (0, 12)]:
        machine.run(30.0, others, own=1)
        follow()
        assert torch.get_num_threads() == expected, others


def test_it_looks_four_times_a_second_at_most(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(machine, 2, 2, monkeypatch).follow
    machine.run(0.1, others=1, own=1)
    follow()
    assert torch.get_num_threads() == 2
    machine.run(0.2, others=1, own=1)
    follow()
    assert torch.get_num_threads() == 1


def test_what_ran_during_a_long_pause_does_not_count(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = follower(machine, 2, 2, monkeypatch).follow
    machine.run(60, others=2, own=0)
    follow()
    assert torch.get_num_threads() == 2
    for others, expected in [(2, 1), (0, 2)]:
        machine.run(0.3, others, own=1)
        follow()
        assert torch.get_num_threads() == expected


@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(0, 20), st.floats(0, 8)), max_size=20))
def test_there_is_always_a_thread_and_never_too_many(steps: list[tuple[float, float, float]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        machine = Machine()
        follow = follower(machine, 8, 6, patch).follow
        for seconds, others, own in steps:
            machine.run(seconds, others, own)
            follow()
            assert 1 <= torch.get_num_threads() <= 6


def test_a_number_of_threads_that_was_chosen_stays(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    follow = follower(machine, 2, 2, monkeypatch).follow
    machine.run(1.0, others=2, own=0)
    follow()
    assert torch.get_num_threads() == 2


def test_the_system_counts_this_process_and_others() -> None:
    before = free_cores._used_by_all(), free_cores._used_by_this_process()
    count = "for _ in range(4_000_000): pass"
    subprocess.run([sys.executable, "-c", count], check=True)
    exec(count)
    of_all, own = free_cores._used_by_all() - before[0], free_cores._used_by_this_process() - before[1]
    assert own > 0 and of_all > 1.2 * own  # the other process has counted as far
