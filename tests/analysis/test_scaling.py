"""The test-time scaling curve: which results have a rate, how many loops their decoding ran, and what the plot shows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from models import architecture, build, tokens

from yoco_u.analysis import scaling
from yoco_u.analysis.exits import Calibration, ExitResult
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings, SamplingParams
from yoco_u.inference.exits import Exits


def result(score: str | None, threshold: float | None, mean: float) -> ExitResult:
    return ExitResult(score, threshold, mean, loss=4 - mean, change=3 - mean)  # type: ignore[arg-type]


PLAIN = [result(None, None, loops) for loops in (1.0, 2.0, 3.0)]
LEAVING = [result("angular", 0.3, 1.5), result("angular", 0.0, 3.0), result("gain", 0.1, 2.0)]


def test_what_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_TOKENS", 8)
    texts = tokens(3, 40).tolist()
    found = Calibration(Exits(num_loops=3, score="angular", threshold=0.3), [*PLAIN, *LEAVING], texts)
    done: list[None] = []
    timed = scaling.with_rates(build(architecture("yoco_u", loop_gate=0.3)), found, lambda: done.append(None), "float32")
    assert len(done) == scaling.rate_steps(found) == 6 * 5
    assert [replace(one, tokens_per_second=None, decoded_loops=None) for one in timed] == found.results
    assert [one.tokens_per_second is None for one in timed] == [False] * 5 + [True]
    assert all(one.tokens_per_second > 0 for one in timed[:5] if one.tokens_per_second is not None)
    assert [one.decoded_loops for one in timed[:3]] == [1, 2, 3] and timed[4].decoded_loops == 3

    settings = EngineSettings(dtype="float32", cache_tokens=1024)
    engine = Engine(build(architecture("yoco_u", loop_gate=0.3)), None, settings)
    params = SamplingParams(num_loops="auto", exit_threshold=0.3, max_tokens=8, seed=0, ignore_eos=True)
    requests = [engine.add(text[:32], params) for text in texts]
    while engine.unfinished:
        engine.step()
    loops = [count for request in requests for count in request.outputs[0].loops]
    assert 1 < sum(loops) / len(loops) < 3 and timed[3].decoded_loops == pytest.approx(sum(loops) / len(loops))


@pytest.mark.parametrize("of_a_task", [False, True])
def test_the_plot_shows_what_has_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_a_task: bool) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(scaling, "save_png", lambda figure, path: saved.append(figure))
    results = [replace(one, tokens_per_second=100 / one.mean_loops) for one in [*PLAIN, *LEAVING[1::-1]]] + LEAVING[2:]
    if of_a_task:
        results = [replace(one, accuracy=one.mean_loops / 4) for one in results]
    scaling.write_scaling_plot(results, tmp_path / "scaling.png")
    [figure] = saved
    figure.draw_without_rendering()
    heights = [([3, 2, 1], [2.5, 1])] + [([0.25, 0.5, 0.75], [0.375, 0.75])] * of_a_task
    assert len(figure.axes) == 2 * len(heights)
    for place, axes in enumerate(figure.axes):
        assert [line.get_label() for line in axes.lines] == ["every token runs T loops", "tokens leave by angular"]
        for line, mean, height in zip(axes.lines, ([1, 2, 3], [1.5, 3]), heights[place // 2], strict=True):
            assert list(line.get_xdata()) == pytest.approx([100 / loops if place % 2 else loops for loops in mean])
            assert list(line.get_ydata()) == pytest.approx(height)
        assert [text.get_text() for text in axes.texts] == (["T = 1", "T = 2", "T = 3"] if place % 2 else [])


def test_a_request_that_fails_ends_the_decoding() -> None:
    model = build(architecture("yoco_u"))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    engine = Engine(model, None, EngineSettings(dtype="float32", cache_tokens=256))
    with pytest.raises(UserError, match="try float32"):
        scaling.decode(engine, [[1, 2, 3]], SamplingParams(max_tokens=4))
