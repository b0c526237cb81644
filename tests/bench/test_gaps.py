"""Benchmarks' own arithmetic: what of a gap in a stream is the server's, against a clock counted tick by tick; and options."""

import runpy
from pathlib import Path

import common
import pytest
from gaps import Gap, Gaps, under
from hypothesis import given
from hypothesis import strategies as st

TICKS = st.integers(0, 60)


@st.composite
def pauses(draw: st.DrawFn) -> list[tuple[float, float]]:
    ends = sorted(draw(st.sets(TICKS, max_size=12)))
    return [(float(begin), float(end)) for begin, end in zip(ends[::2], ends[1::2], strict=False)]


@given(pauses(), st.lists(st.tuples(TICKS, TICKS), max_size=8), TICKS)
def test_of_each_gap_and_of_all(stood: list[tuple[float, float]], spans: list[tuple[int, int]], since: int) -> None:
    found = [Gap(float(min(span)), float(max(span))) for span in spans]
    gaps = Gaps(found, stood)

    def ran(gap: Gap) -> int:
        return sum(not any(begin <= tick < end for begin, end in stood) for tick in range(int(gap.begin), int(gap.end)))

    assert [gaps.of_server(gap) for gap in found] == list(map(ran, found))
    new = [gap for gap in found if gap.end > since]
    expected = (
        max((gap.seconds for gap in new), default=0), max(map(ran, new), default=0),
        max((end - begin for begin, end in stood if end > since), default=0),
    )  # fmt: skip
    assert gaps.longest(since) == expected


def test_a_longer_gap_may_be_less_of_the_server() -> None:
    gaps = Gaps([Gap(0.0, 0.4), Gap(1.0, 1.2)], [(0.05, 0.35)])
    gap, of_server, pause = gaps.longest(0.0)
    assert (gap, round(of_server, 9), round(pause, 9)) == (0.4, 0.2, 0.3)


def test_percentiles() -> None:
    assert [under([float(n) for n in range(1, 101)], percent) for percent in (50, 99)] == [50.0, 99.0]
    assert under([], 50) is None


def test_streams_without_a_second_token_have_no_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    assert Gaps([Gap(0.0, 0.4)], [(0.1, 0.3)]).percentiles() == {
        f"{percent}% of {what}, ms": most
        for percent in ("50", "99", "99.9")
        for what, most in (("gaps under", 400), ("the server", 200))
    }
    assert set(Gaps().percentiles().values()) == {None}
    common.show("The longest gaps", [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tokens", ["2000", "5000"])
def test_training_is_asked_for_whole_rows(
    tokens: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark would report tokens that it has not run."""
    monkeypatch.setattr("sys.argv", ["training.py", "--tokens", tokens])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(common.__file__).with_name("training.py")), run_name="__main__")
    assert ended.value.code == 2
    error = f"error: argument --tokens: is {tokens}; expected a multiple of 2048, the tokens of a row\n"
    assert capsys.readouterr().err == error
