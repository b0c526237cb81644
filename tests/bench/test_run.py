"""The order of a benchmark, its figures, what it leaves out, and what becomes of engines that fail."""

import io
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from scripted_engines import scripted_engine

from yoco_u.architecture import preset
from yoco_u.bench import run as run_module
from yoco_u.bench.cases import BenchSettings, Case, Decode, Prefill, cases_of
from yoco_u.bench.ceilings import Ceilings, unsteady
from yoco_u.bench.engines import BenchEngine
from yoco_u.bench.results import Row, as_json, rows_of
from yoco_u.bench.run import Benchmark, CaseResult, Measurement
from yoco_u.bench.table import print_tables
from yoco_u.budget import decode_bytes, kv_bytes, parameters, prefill_flops
from yoco_u.device import memory_read_rate

SETTINGS = BenchSettings(size="test", contexts=(64, 256), batches=(1, 2), steps=4, rounds=2, time_limit=30)


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(Ceilings(n * 1e9, 20e9 / n) for n in range(1, 100))
    monkeypatch.setattr(run_module, "measure_ceilings", lambda dtype, device: next(rates))


def measured(
    engines: list[BenchEngine], settings: BenchSettings = SETTINGS, log: list[tuple[str, Case | None]] | None = None
) -> Measurement:
    benchmark = Benchmark(settings, engines, {engine.name: cases_of(settings) for engine in engines})
    return benchmark.run(lambda engine, case: log.append((engine.name, case)) if log is not None else None)


def row_of(measurement: Measurement, engine: str, kind: str, context: int, batch: int = 1) -> Row:
    [row] = [r for r in rows_of(measurement) if (r.engine, r.kind, r.context, r.batch) == (engine, kind, context, batch)]
    return row


@pytest.mark.parametrize(("rates", "said"), [([40.0, 47.9], []), ([40.0, 48.5, 41.0], ["40.0 to 48.5 GB/s"]), ([50.0], [])])
def test_a_machine_that_changes_from_turn_to_turn_is_told(rates: list[float], said: list[str]) -> None:
    """The rate of memory of one machine had two peaks, at 40 and at 72 GB/s: a median between them is neither."""
    lines = unsteady([Ceilings(1e12, rate * 1e9) for rate in rates])
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))


def test_figures_by_hand(tmp_path: Path) -> None:
    engines = [scripted_engine(tmp_path, "a", run="seconds = 0.25", architecture="yoco_u"), scripted_engine(tmp_path, "b")]
    measurement = measured(engines)
    a, b = (engine.architecture for engine in engines)
    prefill, decode = row_of(measurement, "b", "prefill", 64), row_of(measurement, "b", "decode", 256, batch=2)
    assert prefill.seconds == [0.5, 0.5]
    assert prefill.tokens_per_second == 64 / 0.5
    assert prefill.rate == prefill_flops(b, 64) / 0.5
    assert prefill.of_ceiling == pytest.approx(prefill.rate / 4e9)  # the highest of two rounds of two engines
    assert prefill.reference_ratio == 2
    assert prefill.parameters == parameters(b).total
    assert decode.tokens_per_second == 2 * 4 / 0.5
    assert decode.rate == 4 * decode_bytes(b, 256, 2) / 0.5
    assert decode.of_ceiling == pytest.approx(decode.rate / 20e9)
    assert decode.kv_bytes == 2 * kv_bytes(b, 256)
    assert row_of(measurement, "a", "decode", 256).kv_bytes == kv_bytes(a, 256)
    assert row_of(measurement, "a", "decode", 256).reference_ratio == 1


def test_weights_count_as_the_worker_says(tmp_path: Path) -> None:
    engine = scripted_engine(tmp_path, "a")
    measurement = measured([engine])
    measurement.about["a"] = {"bytes_per_weight": 34 / 32}
    expected = decode_bytes(engine.architecture, 64, 1, 34 / 32)
    assert row_of(measurement, "a", "decode", 64).rate == pytest.approx(4 * expected / 0.5)


def test_rounds_go_over_all_engines_and_each_is_loaded_once(tmp_path: Path) -> None:
    log: list[tuple[str, Case | None]] = []
    measured([scripted_engine(tmp_path, name) for name in ("a", "b")], log=log)
    assert [name for name, case in log if case == Prefill(64)] == ["a", "b", "a", "b"]
    assert [name for name, case in log if case is None] == ["a", "b"]


def test_large_models_are_measured_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Benchmark, "_keeps_all_loaded", False)
    log: list[tuple[str, Case | None]] = []
    measured([scripted_engine(tmp_path, name) for name in ("a", "b")], log=log)
    assert [name for name, case in log if case == Prefill(64)] == ["a", "a", "b", "b"]
    assert [name for name, case in log if case is None] == ["a", "b"]


def test_no_process_is_left(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)

    def interrupt(engine: BenchEngine, case: Case | None) -> None:
        if case == Decode(64, 1, 4):
            raise KeyboardInterrupt

    benchmark = Benchmark(SETTINGS, [scripted_engine(tmp_path, "a")], {"a": cases_of(SETTINGS)})
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(interrupt)
    assert psutil.Process().children(recursive=True) == before
    assert row_of(benchmark.measurement, "a", "prefill", 64).tokens_per_second == 128
    assert row_of(benchmark.measurement, "a", "decode", 64).tokens_per_second is None


def test_a_failing_engine_does_not_end_the_run(tmp_path: Path) -> None:
    engines = [
        scripted_engine(tmp_path, "good"),
        scripted_engine(tmp_path, "absent", start="import nowhere_to_be_found"),
        scripted_engine(tmp_path, "dying", run="os._exit(1) if case['kind'] == 'prefill' else None"),
        scripted_engine(tmp_path, "complaining", run="assert case['kind'] == 'decode', 'no prefill here'"),
    ]
    measurement = measured(engines)
    assert row_of(measurement, "absent", "decode", 64).failure.startswith("failed: could not start: ModuleNotFoundError")
    assert row_of(measurement, "dying", "prefill", 64).failure == "failed: ended with status 1: chatter on stdout"
    assert row_of(measurement, "complaining", "prefill", 64).failure == "failed: AssertionError: no prefill here"
    for name in ("good", "dying", "complaining"):
        assert row_of(measurement, name, "decode", 64).tokens_per_second == 8
    assert all(
        result.engine.name == "good" or not result.seconds or result.case.kind == "decode"
        for result in measurement.results.values()
    )


def test_a_late_answer_ends_longer_prefills_only(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"time_limit": 3})
    engine = scripted_engine(tmp_path, "slow", run="time.sleep(600 if case['kind'] == 'prefill' else 0)")
    measurement = measured([engine], settings)
    assert row_of(measurement, "slow", "prefill", 64).failure == "timed out: no answer within 3 s"
    assert row_of(measurement, "slow", "prefill", 256).failure == "too long: 64 tokens took over 3 s"
    assert row_of(measurement, "slow", "decode", 64).tokens_per_second == 8


def test_a_prefill_that_would_take_too_long_is_left_out(tmp_path: Path) -> None:
    engine = scripted_engine(tmp_path, "slow", run="seconds = 12 * case.get('tokens', 1) / 64")
    measurement = measured([engine])
    assert row_of(measurement, "slow", "prefill", 64).tokens_per_second is not None
    expected = 12 * prefill_flops(engine.architecture, 256) / prefill_flops(engine.architecture, 64)
    assert f"about {expected:,.0f} s by its rate at 64 tokens" in (row_of(measurement, "slow", "prefill", 256).failure or "")


def test_the_nearest_of_the_shorter_prompts_says_how_long_the_next_takes(tmp_path: Path) -> None:
    """The time of a short prompt is not that of its FLOPs."""
    settings = SETTINGS.model_copy(update={"contexts": (1, 16, 64, 256, 1024, 65536)})
    engine = scripted_engine(tmp_path, "a", run="seconds = 1 + case.get('tokens', 1) / 400")
    measurement = measured([engine], settings)
    assert row_of(measurement, "a", "prefill", 1024).seconds == [3.56, 3.56]
    expected = 3.56 * prefill_flops(engine.architecture, 65536) / prefill_flops(engine.architecture, 1024)
    failure = row_of(measurement, "a", "prefill", 65536).failure
    assert failure == f"too long: about {expected:,.0f} s by its rate at 1,024 tokens, the limit is 30"


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ("assert run.calls < 2, 'no more'", "failed in round 2: AssertionError: no more"),
        ("os._exit(3) if run.calls == 2 else None", "failed in round 2: ended with status 3: chatter on stdout"),
    ],
    ids=["error", "end"],
)
def test_a_failure_behind_the_first_round_is_told_beside_the_figure(tmp_path: Path, second: str, told: str) -> None:
    engine = scripted_engine(tmp_path, "a", run=f"run.calls = getattr(run, 'calls', 0) + 1; {second}")
    settings = SETTINGS.model_copy(update={"rounds": 3})
    measurement = Benchmark(settings, [engine], {"a": [Prefill(64)]}).run(lambda engine, case: None)
    [row] = rows_of(measurement)
    assert (row.seconds, row.tokens_per_second, row.failure) == ([0.5], 128, told)
    assert as_json(measurement)["rows"][0]["failure"] == told
    text = io.StringIO()
    print_tables(Console(file=text, width=200), measurement)
    shown = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert f"a: {told} (prefill 64)" in shown
    assert any(line.startswith("a 128 ") for line in shown)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_ceilings_are_measured_while_no_engine_holds_the_gpu(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU before each turn of an engine."""
    monkeypatch.setattr(run_module, "memory_bytes", lambda device: 2**40)
    settings = SETTINGS.model_copy(update={"device": device})
    engines = [scripted_engine(tmp_path, name) for name in ("a", "b")]
    benchmark = Benchmark(settings, engines, {engine.name: [Prefill(64)] for engine in engines})
    loaded: list[list[str]] = []

    def measure(dtype: str, device: torch.device) -> Ceilings:
        loaded.append(list(benchmark._workers))
        return Ceilings(1e12, 1e10)

    monkeypatch.setattr(run_module, "measure_ceilings", measure)
    benchmark.run(lambda engine, case: None)
    assert loaded == ([[], []] if device == "cuda:0" else [[], ["a"], ["a", "b"], ["b"]])


def test_dear_cases_are_not_repeated(tmp_path: Path) -> None:
    measurement = measured([scripted_engine(tmp_path, "a", run="seconds = 25 if case['kind'] == 'decode' else 1")])
    assert row_of(measurement, "a", "prefill", 64).seconds == [1, 1]
    assert row_of(measurement, "a", "decode", 64).seconds == [25]


def test_what_cannot_fit_is_not_tried(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"contexts": (64, 2**40)})
    engine = scripted_engine(tmp_path, "a", start="assert all(c.get('context', 64) == 64 for c in job['cases'])")
    measurement = measured([engine], settings)
    assert row_of(measurement, "a", "decode", 64).tokens_per_second == 8
    assert "GiB" in (row_of(measurement, "a", "decode", 2**40).failure or "")


def test_each_engine_has_cases_of_its_own(tmp_path: Path) -> None:
    engines = [scripted_engine(tmp_path, name) for name in ("a", "b")]
    benchmark = Benchmark(SETTINGS, engines, {"a": [Decode(64, 2, 4)], "b": [Decode(64, 1, 4), Prefill(64)]})
    rows = rows_of(benchmark.run(lambda engine, case: None))
    assert [(row.engine, row.kind, row.batch) for row in rows] == [("a", "decode", 2), ("b", "decode", 1), ("b", "prefill", 1)]
    assert [row.reference_ratio for row in rows] == [1, None, None]


def test_on_a_gpu_memory_and_peaks_are_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = preset("transformer", "test")
    weights = 2 * parameters(a).total
    monkeypatch.setattr(run_module, "memory_bytes", lambda device: weights + int(kv_bytes(a, 256) * 1.5))
    settings = SETTINGS.model_copy(update={"device": "cuda:0"})
    log: list[tuple[str, Case | None]] = []
    engines = [scripted_engine(tmp_path, name, answer="{'gpu_peak_bytes': 77}") for name in ("a", "b")]
    measurement = measured(engines, settings, log)
    assert row_of(measurement, "a", "decode", 256).peak_bytes == 77
    assert "the GPU has" in (row_of(measurement, "a", "decode", 256, batch=2).failure or "")
    assert [name for name, case in log if case == Prefill(64)] == ["a", "a", "b", "b"]  # each alone has the GPU's memory


def test_memory_read_rate_is_plausible() -> None:
    assert 1e8 < memory_read_rate(2**22, 2) < 1e14


def test_engines_are_called_by_their_folders_in_tables_too(tmp_path: Path) -> None:
    """Whatever brackets these have, which rich reads as markup elsewhere."""
    engine = scripted_engine(tmp_path, "a")
    for name in ("run [/bold]", "[red]", "[/]", "a\\"):
        results = {(name, case): CaseResult(replace(engine, name=name), case, 0, [1.0]) for case in cases_of(SETTINGS)}
        measurement = Measurement(SETTINGS, results, [Ceilings(1e12, 1e10)], {name: {}})
        text = io.StringIO()
        print_tables(Console(file=text, width=200), measurement)
        assert f"how many times as fast {name} is" in text.getvalue()
        assert sum(line.startswith(f"  {name}") for line in text.getvalue().splitlines()) == len(results)
