"""The test-time scaling curve: what a model reaches with more loops, over mean loops and over the speed of decoding."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, harmonic_mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from yoco_u.analysis.exits import Calibration, ExitResult
from yoco_u.inference import Engine, EngineSettings, RequestOutput, SamplingParams
from yoco_u.inference.outputs import check_outputs
from yoco_u.model import YocoUForCausalLM
from yoco_u.plotting import colour, open_frame, save_png

_PROMPTS, _PROMPT_TOKENS = 4, 32
_TOKENS = 64  # decoded behind each prompt
_ROUNDS = 5


def with_rates(
    model: YocoUForCausalLM, found: Calibration, advance: Callable[[], None] = lambda: None, dtype: str = "auto"
) -> list[ExitResult]:
    """The results of a calibration, with the speed of decoding at plain loop counts and at the thresholds of the chosen score.

    The engine decodes 64 tokens behind the beginnings of four texts of the second half, one sequence at a time, sampled at
    temperature 1 with one seed, as tokens that are drawn from the model leave the loop about where those of a text do. All
    measurements are made in turns; the first one of each warms up, and the median of the other five counts.

    Args:
        model: that was calibrated. It is the engine's from then on.
        advance: called `rate_steps(found)` times, as work gets done.
        dtype: of the engine, see `EngineSettings`.
    """
    prompts = [text[:_PROMPT_TOKENS] for text in found.texts[:_PROMPTS]]
    settings = EngineSettings.model_validate(
        {
            "dtype": dtype, "num_loops": found.exits.num_loops, "prefix_caching": False, "max_num_seqs": 1,
            "cache_tokens": _PROMPT_TOKENS + _TOKENS + 128,
        }
    )  # fmt: skip
    engine = Engine(model, None, settings, found.exits)
    rates: dict[int, list[float]] = {place: [] for place in _measured(found)}
    loops: dict[int, float] = {}
    for turn in range(_ROUNDS + 1):
        for place, own in rates.items():
            threshold = found.results[place].threshold
            params = SamplingParams(
                max_tokens=_TOKENS, ignore_eos=True, temperature=1, seed=0, drafts="none",
                num_loops=place + 1 if threshold is None else "auto", exit_threshold=threshold,
            )  # fmt: skip
            decoded = [decode(engine, [prompt], params) for prompt in prompts]
            loops[place] = fmean(count for _, requests in decoded for count in requests[0].outputs[0].loops)
            if turn:
                own.append(harmonic_mean(rate for rate, _ in decoded))  # as all decode the same number of tokens
            advance()
    return [
        replace(one, tokens_per_second=median(rates[place]), decoded_loops=loops[place]) if place in rates else one
        for place, one in enumerate(found.results)
    ]


def decode(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> tuple[float, list[RequestOutput]]:
    """Decode a batch, all of whose requests run at once.

    Returns:
        Tokens per second, from the step in which the last request has its first token to the last step, and the requests.

    Raises:
        UserError: if a request fails.
    """
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.unfinished and not all(request.outputs[0].token_ids for request in requests):
        engine.step()
    began, before = time.perf_counter(), sum(len(request.outputs[0].token_ids) for request in requests)
    while engine.unfinished:
        engine.step()
    seconds = time.perf_counter() - began
    check_outputs(requests)
    return (sum(len(request.outputs[0].token_ids) for request in requests) - before) / seconds, requests


def rate_steps(found: Calibration) -> int:
    """How often `with_rates` advances."""
    return (_ROUNDS + 1) * len(_measured(found))


def write_scaling_plot(results: Sequence[ExitResult], path: Path) -> None:
    """Draw the loss, and below it the share of right answers where there is one, over mean loops and over tokens per second.

    Args:
        results: those with a rate are drawn.
    """
    drawn = [one for one in results if one.tokens_per_second is not None]
    plain = [one for one in drawn if one.score is None]
    leaving = sorted((one for one in drawn if one.score is not None), key=lambda one: one.mean_loops)
    rows: list[tuple[str, Callable[[ExitResult], Any]]] = [("loss, nats per token", lambda one: one.loss)]
    if plain[0].accuracy is not None:
        rows = [("loss, nats per token of an answer", rows[0][1]), ("right answers", lambda one: one.accuracy)]
    figure = Figure(figsize=(10, 3.2 * len(rows) + 0.6), layout="constrained", dpi=150)
    grid = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
    for (left, right), (unit, value) in zip(grid, rows, strict=True):
        left.set_ylabel(unit)
        if unit == "right answers":
            left.yaxis.set_major_formatter(PercentFormatter(1))
        _draw(left, "loops a token, on average", plain, leaving, lambda one: one.mean_loops, value)
        _draw(right, "tokens per second, one sequence", plain, leaving, lambda one: one.tokens_per_second, value)
        right.margins(x=0.1)
        for loops, one in enumerate(plain, start=1):
            place = (one.tokens_per_second, value(one))
            right.annotate(f"T = {loops}", place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_png(figure, path)


def _draw(
    axes: Axes,
    label: str,
    plain: Sequence[ExitResult],
    leaving: Sequence[ExitResult],
    x: Callable[[ExitResult], Any],
    y: Callable[[ExitResult], Any],
) -> None:
    lines = (("every token runs T loops", "o", plain), (f"tokens leave by {leaving[0].score}", "s", leaving))
    for index, (name, marker, own) in enumerate(lines):
        points = list(map(x, own)), list(map(y, own))
        axes.plot(*points, color=colour(index), label=name, marker=marker, markersize=4, linewidth=1.5)
    axes.set_xlabel(label)
    open_frame(axes, grid=0.2)


def _measured(found: Calibration) -> list[int]:
    """The places of the results whose rates are measured."""
    return [place for place, one in enumerate(found.results) if one.score in (None, found.exits.score)]
