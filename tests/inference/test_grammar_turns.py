"""Who waits for whom while grammars are compiled: honest ones, however large, for few seconds of what strangers sent."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoco_u.data import END_OF_TEXT, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference import constraints, turns
from yoco_u.inference.constraints import Grammars
from yoco_u.inference.sampling_params import SamplingParams
from yoco_u.inference.turns import Crowded, Turns

TOKENIZER = train_tokenizer(["abc 123\n"] * 20, 300)
EOS = TOKENIZER.convert_tokens_to_ids(END_OF_TEXT)
MOST = constraints._SECONDS


def gate(turns: Turns, at_once: int) -> threading.Event:
    """Occupy the threads until the event is set."""
    go_on = threading.Event()
    for _ in range(at_once):
        turns._threads.submit(go_on.wait)
    return go_on


class Clock(Grammars):
    """Compiles nothing: a grammar says itself how many seconds it takes, and they are written down."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, len(TOKENIZER), [EOS])
        self._quick, self._slow = Turns("quick", 1, "are"), Turns("slow", 1, "are")
        self.gates = [gate(self._quick, 1), gate(self._slow, 1)]
        self.tries: list[tuple[str, float]] = []  # what ran, and for how long

    def open(self) -> None:
        for one in self.gates:
            one.set()

    def _compile(self, params: SamplingParams, grammar: bytes, seconds: float) -> None:
        name, takes = params.json_schema["is"]  # type: ignore[index]
        self.tries.append((name, min(seconds, takes)))
        if takes > seconds:
            if seconds < MOST:
                raise constraints._Long
            raise UserError("it takes too long")

    def add(self, name: str, takes: float, characters: int = 0) -> "Future[None]":
        return self.prepare(SamplingParams(json_schema={"is": [name, takes], "description": "x" * characters}))

    def ahead(self, name: str) -> float:
        """Seconds of others up to when a grammar had been compiled."""
        last = max(index for index, (other, _) in enumerate(self.tries) if other == name)
        return sum(seconds for other, seconds in self.tries[:last] if other != name)


@pytest.fixture
def clock() -> Iterator[Clock]:
    found = Clock()
    yield found
    found.open()


@pytest.mark.parametrize(("characters", "takes"), [(200_000, 1.5), (100_000, 1.0), (40_000, 0.3)])
def test_a_large_honest_grammar_does_not_wait_for_hostile_ones(clock: Clock, characters: int, takes: float) -> None:
    """Which came before it, ask for a lot in few characters, and have had their first tries."""
    hostile = [clock.add(f"hostile {number}", 99) for number in range(60)]
    clock.gates[0].set()
    while len(clock.tries) < 60:
        time.sleep(0.001)
    honest = clock.add("honest", takes, characters)
    clock.open()
    assert honest.result(timeout=600) is None
    seconds = [seconds for _, seconds in clock.tries[60:]]
    assert seconds[0] == takes
    for one in hostile:
        with pytest.raises((UserError, Crowded)):
            one.result(timeout=600)
    assert sum(seconds) <= turns._LONGEST_WAIT + 2 * MOST  # the others were refused instead


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from([0.01, 0.3, 99.0]), st.sampled_from([0, 20_000, 200_000])), min_size=1, max_size=120),
    st.sampled_from([0, 30_000, 200_000]),
)
def test_whoever_is_taken_waits_for_a_limited_time(others: list[tuple[float, int]], characters: int) -> None:
    clock = Clock()
    for number, (takes, length) in enumerate(others):
        clock.add(f"other {number}", takes, length)
    mine = clock.add("mine", 0.05, characters)
    clock.open()
    try:
        mine.result(timeout=600)
    except Crowded as crowded:
        assert len(others) * MOST > turns._LONGEST_WAIT and "try again in 30 s, or with a simpler one" in str(crowded)
    else:
        assert clock.ahead("mine") <= 2 * (turns._LONGEST_WAIT + MOST)  # in its own queue, and beside it in the other


def test_those_who_have_gone_hold_up_nobody(clock: Clock) -> None:
    gone = [clock.add(f"gone {number}", 99, 200_000) for number in range(16)]
    with pytest.raises(Crowded):
        clock.add("refused", 1, 200_000).result(timeout=600)
    assert all(one.cancel() for one in gone)
    mine = clock.add("mine", 1, 200_000)
    again = clock.add("gone 3", 1.5, 200_000)  # somebody else wants what was given up
    clock.open()
    assert mine.result(timeout=600) is None and again.result(timeout=600) is None
    assert {name for name, _ in clock.tries} == {"mine", "gone 3"}


def test_many_who_want_one_grammar_compile_it_once(clock: Clock) -> None:
    same = [clock.add("same", 1.0, 5) for _ in range(40)]
    assert same[0].cancel() and same[7].cancel()
    clock.open()
    assert all(one.result(timeout=600) is None for one in same if not one.cancelled())
    assert [seconds for _, seconds in clock.tries] == [pytest.approx(0.1, abs=0.01), 1.0]


def test_the_shortest_comes_first() -> None:
    turns, ran, done = Turns("some", 1, "are"), [], threading.Event()
    go_on = gate(turns, 1)
    for seconds in (2.0, 0.5, 1.0, 0.5):
        turns.take(seconds, lambda: True, lambda seconds=seconds: ran.append(seconds))  # type: ignore[misc]
    turns.take(3.0, lambda: True, done.set)
    go_on.set()
    assert done.wait(60) and ran == [0.5, 0.5, 1.0, 2.0]


SLOW: dict[str, Any] = {"allOf": [{"type": "string", "pattern": f".*X.{{{i}}}$"} for i in range(1, 25)]}


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch) -> Grammars:
    monkeypatch.setattr(constraints, "_SECONDS", 0.2)
    return Grammars(TOKENIZER, len(TOKENIZER), [EOS])


@pytest.mark.parametrize(("schema", "problem"), [(SLOW, r"more than 0\.2 s of computing"), ({"type": 5}, "type must be")])
def test_what_failed_is_refused_at_once(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any], problem: str
) -> None:
    started, new = [], grammars._new_process

    def noted(seconds: float) -> Any:
        started.append(seconds)
        return new(seconds)

    monkeypatch.setattr(grammars, "_new_process", noted)
    params = SamplingParams(json_schema=schema)
    with pytest.raises(UserError, match=problem) as first:
        grammars.prepare(params).result(timeout=600)
    count = len(started)
    again = grammars.prepare(SamplingParams(json_schema=json.dumps(schema)))
    assert again.done() and str(again.exception()) == str(first.value)
    with pytest.raises(UserError, match=problem):
        grammars.matcher(params)
    assert len(started) == count
    monkeypatch.setattr(constraints, "_FORGIVEN", 0.0)
    with pytest.raises(UserError, match=problem):
        grammars.prepare(params).result(timeout=600)
    assert len(started) > count


def test_what_others_compile_holds_up_neither_known_grammars_nor_the_engine(grammars: Grammars) -> None:
    """The engine's thread makes the matchers: it must not wait behind grammars that take long to compile."""
    known = SamplingParams(regex="[0-9]{2}")
    grammars.matcher(known)
    gates = [gate(grammars._quick, 32), gate(grammars._slow, 32)]
    try:
        assert grammars.prepare(known).done()
        assert not grammars.prepare(SamplingParams(regex="[0-9]{5}")).done()
        for params in (known, SamplingParams(regex="[0-9]{4}")):
            matcher = grammars.matcher(params)
            assert matcher is not None and matcher.allowed().any()
            matcher.close()
    finally:
        for one in gates:
            one.set()


def test_new_grammars_do_not_wait_for_those_that_take_long(grammars: Grammars) -> None:
    """What takes long waits behind the first try of all others, is refused in the end, and can be taken back meanwhile."""
    go_on = gate(grammars._slow, constraints._COMPILED)
    try:
        slow = [grammars.prepare(SamplingParams(json_schema=SLOW | {"description": str(number)})) for number in range(2)]
        assert grammars.prepare(SamplingParams(regex="[a-d]{7}")).result(timeout=600) is None
        with pytest.raises(UserError, match="unclosed"):
            grammars.prepare(SamplingParams(regex="[a-")).result(timeout=600)
        assert not any(one.done() for one in slow)
        assert slow[1].cancel()
    finally:
        go_on.set()
    with pytest.raises(UserError, match=r"it takes more than 0\.2 s of computing"):
        slow[0].result(timeout=120)
