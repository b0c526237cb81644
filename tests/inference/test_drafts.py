"""Drafts looked up against a search through the whole text, and the choice of lengths on a machine whose times are known."""

import random
from dataclasses import dataclass

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_lookup import searched

from yoco_u.inference.drafts import LONGEST, Acceptance, Candidate, DraftLengths, PromptDrafts, StepTime, gain

TOKENS = st.sampled_from([0, 1, 2, 3, 256, 2**16, 2**16 + 1, 2**24])  # few, and with the same bytes at other places


@settings(max_examples=examples(100))
@given(text=st.lists(TOKENS, max_size=40), count=st.integers(1, 9), cuts=st.lists(st.integers(0, 40), max_size=3))
def test_prompt_drafts_are_what_stood_behind_the_same_tokens(text: list[int], count: int, cuts: list[int]) -> None:
    lookup = PromptDrafts()
    for cut in sorted([*cuts, len(text)]):
        lookup.extend(text[lookup.known : cut])
        assert lookup.next(count) == searched(text[:cut], count)


def test_acceptance_follows_an_output_and_begins_with_what_is_usual() -> None:
    usual = Acceptance()
    for _ in range(100):
        usual.take(0, rejected=True)
    own = usual.own()
    assert own.rate == usual.rate < 0.05
    for _ in range(20):
        own.take(3, rejected=False)
    assert own.rate > 0.95 and usual.rate < 0.05


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.9, 1.0])
def test_gain_is_the_mean_number_of_tokens_before_the_first_wrong_one(rate: float) -> None:
    draw, count = random.Random(1), 20_000
    lengths = [next((i for i in range(5) if draw.random() >= rate), 5) for _ in range(count)]
    assert abs(sum(lengths) / count - gain(rate, 5)) < 0.05


@dataclass
class Machine:
    """Seconds of a plain step, of a pass of drafting, and of a token more; the probability that a draft's token is right."""

    plain: float
    a_pass: float
    a_token: float
    rate: float
    decodes: int = 1
    by_loops: bool = True

    def speed(self, steps: int, lengths: DraftLengths, acceptances: list[Acceptance], draw: random.Random) -> float:
        """Tokens of so many steps, by those of plain decoding in the same time."""
        tokens = 0
        seconds = 0.0
        for _ in range(steps):
            chosen = lengths.choose(self.decodes, [Candidate(self.by_loops, one.rate, LONGEST) for one in acceptances])
            passes = max(chosen) if self.by_loops else 0
            drafting = passes * self.a_pass
            took = self.plain * draw.uniform(0.9, 1.1) + drafting + sum(chosen) * self.a_token
            lengths.take(StepTime(self.decodes, passes, sum(chosen), drafting, took))
            seconds += took
            for one, length in zip(acceptances, chosen, strict=True):
                right = next((i for i in range(length) if draw.random() >= self.rate), length)
                one.take(right, rejected=right < length)
                tokens += 1 + right
        return tokens / seconds * self.plain / self.decodes


MACHINES = {
    "loops": Machine(1.0, 0.4, 0.02, 0.0),
    "loops, many": Machine(1.0, 0.5, 0.06, 0.0, decodes=16),
    "prompt": Machine(1.0, 0.0, 0.05, 0.0, by_loops=False),
    "prompt, many": Machine(1.0, 0.0, 0.06, 0.0, decodes=16, by_loops=False),
}


@pytest.mark.parametrize("name", MACHINES)
def test_drafts_that_fail_cost_little_and_those_that_are_right_gain(name: str) -> None:
    """By simulation: within 5% of plain decoding; near the best fixed length; and back again when the text changes."""
    machine, draw = MACHINES[name], random.Random(2)
    lengths, acceptances = DraftLengths(), [Acceptance().own() for _ in range(machine.decodes)]
    machine.rate = 0.0
    assert machine.speed(500, lengths, acceptances, draw) > 0.95
    machine.rate = 0.95
    machine.speed(600, lengths, acceptances, draw)  # tries drafts, and finds that they are right
    found = machine.speed(300, lengths, acceptances, draw)
    best = max(
        (1 + gain(0.95, n)) / (machine.plain + n * machine.a_pass + n * machine.decodes * machine.a_token)
        for n in range(LONGEST + 1)
    )
    assert found > 0.9 * best
    machine.rate = 0.0
    machine.speed(60, lengths, acceptances, draw)
    assert machine.speed(500, lengths, acceptances, draw) > 0.95


@pytest.mark.parametrize(("found", "asked"), [(0.0, 1.0), (0.1, 1.0), (1.0, 1.0), (1.0, 0.0), (1.0, 0.05)])
def test_trials_take_their_share_of_the_time_however_long_nothing_was_found(found: float, asked: float) -> None:
    """Steps in which nothing can be drafted, as where prompt lookup finds nothing, save no time for trials to come.

    Nor do those in which no request drafts, so that nothing is asked.
    """
    lengths, draw = DraftLengths(), random.Random(3)
    for step in range(5000):
        chosen = [0]
        if step < 3 or draw.random() < asked:
            chosen = lengths.choose(1, [Candidate(False, 0.02, LONGEST if draw.random() < found else 0)])
        lengths.take(StepTime(1, 0, sum(chosen), 0.0, 1.0 + 0.3 * sum(chosen)))
    spent, trials = 0.0, 0
    for _ in range(2000):
        chosen = lengths.choose(1, [Candidate(False, 0.02, LONGEST)])
        spent, trials = spent + 0.3 * sum(chosen), trials + any(chosen)
        lengths.take(StepTime(1, 0, sum(chosen), 0.0, 1.0 + 0.3 * sum(chosen)))
    assert trials > 30 and spent < 0.025 * 2000


def test_times_are_those_of_the_batch() -> None:
    """Where a token more costs as much as a step, as in a large batch, nothing is drafted; a request alone goes on drafting."""
    lengths = DraftLengths()
    right = Candidate(by_loops=False, rate=0.9, most=8)
    for _ in range(20):
        for decodes, a_token in ((1, 0.05), (16, 1.0)):
            chosen = lengths.choose(decodes, [right] * decodes)
            lengths.take(StepTime(decodes, 0, sum(chosen), 0.0, 1.0 + a_token * sum(chosen)))
    assert lengths.choose(1, [right]) == [right.most]
    assert lengths.choose(16, [right] * 16) == [0] * 16


def test_each_request_of_a_batch_has_a_length_of_its_own() -> None:
    lengths = DraftLengths()
    lengths.take(StepTime(4, 0, 0, 0.0, 1.0))
    rates = [0.95, 0.6, 0.02, 0.95]
    chosen = lengths.choose(4, [Candidate(False, rate, most) for rate, most in zip(rates, (8, 8, 8, 3), strict=True)])
    assert chosen[0] > chosen[1] > chosen[2] == 0 and chosen[3] == 3


def test_a_plain_step_is_timed_now_and_then() -> None:
    lengths = DraftLengths()
    plain = 0
    for _ in range(200):
        chosen = lengths.choose(1, [Candidate(True, 1.0, 8)])
        passes = max(chosen)
        plain += not passes
        lengths.take(StepTime(1, passes, passes, 0.1 * passes, 1.0 + 0.11 * passes))
    assert 3 <= plain <= 5
