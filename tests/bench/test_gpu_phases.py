"""Every phase of `benchmarks/gpu.py` runs, here at toy size on the CPU, and the checks among them see what is wrong."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash import use_flash
from forked import SUBPROCESS
from gpu_phases import (
    check_engine,
    check_flash,
    check_models,
    correctness,
    machine,
    peers,
    profiling,
    tables,
    targets,
    training,
)
from gpu_phases import text as texts
from gpu_phases.check import largest_error, typical_error, verdict
from gpu_phases.record import Record
from gpu_phases.scale import FULL, TOY
from hypothesis import given
from hypothesis import strategies as st

from yoco_u.architecture import STAGES, preset
from yoco_u.bench import process
from yoco_u.bench import run as run_module
from yoco_u.bench.cases import Decode, Prefill
from yoco_u.bench.ceilings import Ceilings
from yoco_u.bench.engines import our_engines
from yoco_u.errors import UserError
from yoco_u.inference.runner import Runner
from yoco_u.model import gpu_attention
from yoco_u.paper import DECODE_TOKENS_PER_SECOND

SMALL = replace(TOY, check_presets=("yoco_u",), architectures=("yoco_u",), contexts=(32,))


def figures(run: Callable[..., None], folder: Path, scale: Any = SMALL) -> dict[str, dict[str, Any]]:
    """What a phase writes, as its file has it; nothing in it has failed."""
    record = Record(folder / "phase.json")
    run(record, scale)
    found = json.loads((folder / "phase.json").read_text())["figures"]
    assert found and not any("failure" in figure for figure in found.values())
    return found


def test_the_machine(tmp_path: Path) -> None:
    found = figures(machine.run, tmp_path)
    assert found["environment"]["torch"] == torch.__version__
    assert 1e6 < found["matrix products"]["mean_flops_per_second"] <= found["matrix products"]["best_flops_per_second"] < 1e16
    assert 1e8 < found["memory"]["copy_bytes_per_second"] < 1e14


def test_correctness(tmp_path: Path) -> None:
    """On the CPU the device is the truth itself, so float32 models have no error at all."""
    found = figures(correctness.run, tmp_path)
    assert not any(figure["wrong"] for figure in found.values())
    for kind in ("whole", "packed", "padded"):
        assert found[f"yoco_u test, {kind} rows, float32 gradients"]["error"] == 0
        assert found[f"yoco_u test, {kind} rows, bfloat16 logits"]["cpu_error"] > 1e-3
    assert found["yoco_u test, engine, float32 tokens"]["agreement"] == 1
    for subject in ("yoco_u", "experts"):
        assert f"{subject} test, engine, loop counts of one batch" in found
    assert any(name.startswith("decode attention") for name in found)


def test_a_device_that_errs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key too many in every window."""
    right = check_models._Check._on_device

    def shifted(self: Any, part: Any) -> Any:
        window = self.model.model.architecture.window
        self.model.model.architecture = self.model.model.architecture.model_copy(update={"window": window + 1})
        try:
            return right(self, part)
        finally:
            self.model.model.architecture = self.model.model.architecture.model_copy(update={"window": window})

    monkeypatch.setattr(check_models._Check, "_on_device", shifted)
    record = Record(tmp_path / "phase.json")
    check_models.check_models(record, SMALL, "test")
    assert len(record.figures) == 2 * 3 * 4  # of the preset, and of a mixture of experts
    assert all(figure["wrong"] for figure in record.figures.values())


@pytest.mark.parametrize("error", [largest_error, typical_error])
def test_what_is_not_finite_is_wrong(error: Callable[..., float]) -> None:
    truth = torch.tensor([1.0, -2.0, 0.0])
    assert error(truth, truth) == 0
    assert error(truth * 1.5, truth) == 0.5
    assert error(torch.tensor([1.0, math.nan, 0.0]), truth) == math.inf
    assert verdict(math.inf, 4.0)["wrong"] and verdict(math.nan, 4.0)["wrong"] and not verdict(4.0, 4.0)["wrong"]


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stand-in for torch's operator, whose window can be one key too wide."""
    use_flash(monkeypatch)
    lengths = (1, 17, 40)
    found = check_flash.attention(torch.device("cpu"), (4, 2, 8), lengths, window)
    assert not found["wrong"] and found["error"] > 1e-4
    if window is not None:
        right = gpu_attention.varlen_attn
        monkeypatch.setattr(
            gpu_attention, "varlen_attn", lambda *args, window_size, **kwargs: right(*args, window_size=(window, 0), **kwargs)
        )
        assert check_flash.attention(torch.device("cpu"), (4, 2, 8), lengths, window)["wrong"]


def test_the_engine_of_a_gpu_with_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph replays is called again here."""
    captured: list[Any] = []

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        captured.append(function)
        return function

    monkeypatch.setattr("yoco_u.inference.engine.Runner", partial(Runner, on_gpu=True, capture=capture))
    subject = check_engine._Subject(preset("yoco_u", "test"), "cpu")
    assert not subject.against_the_model("float32")["wrong"]
    assert captured
    found = subject.against_no_graphs()
    assert found["error"] == found["sequences_that_differ"] == 0
    assert not subject.against_the_model("float32", (1, None), leave=True)["wrong"]
    with monkeypatch.context() as patch:
        patch.setattr(check_engine, "NEVER_AND_ALWAYS", (0.0, 0.0))
        assert subject.against_the_model("float32", (1, None), leave=True)["wrong"]


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure_ceilings", lambda dtype, device: Ceilings(1e12, 1e10))
    monkeypatch.setattr(process, "subprocess", SUBPROCESS)
    found = figures(tables.run, tmp_path)
    assert set(found) == {"yoco_u, prefill 2048", "yoco_u, decode 32, batch 2"}
    for figure in found.values():
        assert figure["tokens_per_second"] > 0 and figure["peak_bytes"] > 0 and len(figure["seconds"]) == 1


@pytest.mark.parametrize("on_gpu", [False, True])
def test_peers(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100, which has room for fewer sequences than the paper's batch; the longest prompt comes last."""
    measured: dict[str, list[Any]] = {}
    monkeypatch.setattr(peers, "measure", lambda record, settings, engine, cases: measured.update({engine.name: cases}))
    monkeypatch.setattr(peers, "find_device", lambda name: torch.device(name))
    monkeypatch.setattr(tables, "find_device", lambda name: torch.device(name))
    monkeypatch.setattr(peers, "memory_bytes", lambda device: 79 * 2**30)
    peers.run(Record(Path("nowhere")), FULL if on_gpu else SMALL)
    if not on_gpu:
        assert list(measured) == ["llama in transformers"]
        return
    cases = measured["llama in transformers"]
    assert [case.batch for case in cases if isinstance(case, Decode)] == [32, 32, 15, 3]
    assert cases[-1] == Prefill(262144)
    assert measured["llama in transformers, compiled"] == [Decode(16384, 32, 32)]


def test_cases_that_are_measured_load_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "phase.json")
    for name in ("yoco_u, prefill 2048", "yoco_u, decode 32, batch 2"):
        record.keep(name, {"tokens_per_second": 1.0})
    monkeypatch.setattr(tables, "Benchmark", None)
    tables.run(record, SMALL)


def test_a_failure_behind_the_first_round_is_kept_beside_the_figure(tmp_path: Path) -> None:
    """And the case is measured again by the next call."""
    record, [engine] = Record(tmp_path / "phase.json"), our_engines(tables.settings_of(SMALL))
    result = run_module.CaseResult(engine, Prefill(2048), 0, [0.5], "failed in round 2: out of luck")
    benchmark: Any = SimpleNamespace(measurement=SimpleNamespace(results={"one": result}))
    tables._keep(record, benchmark, final=True)
    [figure] = Record(record.path).figures.values()
    assert (figure["tokens_per_second"], figure["failure"]) == (4096, result.failure)
    record.retry_failures()
    assert record.is_due("yoco_u, prefill 2048")


def test_without_time_cases_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "phase.json", until=0)
    monkeypatch.setattr(tables, "Benchmark", None)
    tables.run(record, SMALL)
    assert [figure["failure"][:8] for figure in record.figures.values()] == ["left out"] * 2


def test_a_profile(tmp_path: Path) -> None:
    found = figures(profiling.run, tmp_path)
    assert list(found) == ["decode step, batch 2, context 32", "prefill of 32 tokens behind 0"]
    for figure in found.values():
        assert 0 < figure["busy_seconds"] <= figure["seconds"] and 0 <= figure["idle_share"] < 1
        assert len(figure["kernels"]) == profiling.KERNELS
        assert figure["kernels"][0]["microseconds"] >= figure["kernels"][-1]["microseconds"]
    text = (tmp_path / "profile.txt").read_text()
    assert "decode step, batch 2, context 32" in text and "idle" in text


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_covered_time_is_that_of_the_union(spans: list[tuple[int, int]]) -> None:
    ends = sorted((begin, begin + length) for begin, length in spans)
    assert profiling.covered([(float(a), float(b)) for a, b in ends]) == len({t for a, b in ends for t in range(a, b)})


def test_training(tmp_path: Path) -> None:
    found = figures(training.run, tmp_path)
    assert list(found) == ["yoco_u test, length 32", "llama test, length 32"]
    for figure in found.values():
        assert figure["tokens_per_second"] == pytest.approx(32 / figure["seconds_of_a_step"])
        assert figure["model_flops_per_second"] > figure["tokens_per_second"]
        assert figure["loss"] == pytest.approx(math.log(96), rel=0.3) and not figure["recomputed"]


def test_activations_that_do_not_fit_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def timed(*arguments: Any, recompute: bool) -> dict[str, bool]:
        calls.append(recompute)
        if not recompute:
            raise torch.OutOfMemoryError
        return {"recomputed": recompute}

    monkeypatch.setattr(training, "_timed", timed)
    assert training._measure(SMALL.trained[0], torch.device("cpu"), 1) == {"recomputed": True}
    assert calls == [False, True]


@pytest.mark.parametrize("make", [training.our_step, training.llama_step])
def test_a_step_that_recomputes_has_the_same_loss(make: Any) -> None:
    a, trained = preset("yoco_u" if make is training.our_step else "transformer", "test"), SMALL.trained[0]
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        losses.append(float(make(a, trained, torch.device("cpu"), recompute)()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_targets_follow_from_the_arithmetic() -> None:
    """By hand: 790e12 / 3.34e9 tokens of a prefill; a step of 32 sequences reads 4.71e9 + 1.0e9 bytes and the global KV."""
    for target in targets.prefill_targets():
        assert target.ceiling == pytest.approx(790e12 / 3.34e9, rel=0.003)
        assert target.paper < target.goal < target.ceiling
    for target in targets.decode_targets():
        read = 4.71e9 + 32 * 30 * 512 * 2048 + 10 * 32 * target.context * 2048
        assert target.ceiling == pytest.approx(32 * 3.0e12 / read, rel=0.002)
        assert target.paper == DECODE_TOKENS_PER_SECOND[target.context]["yoco_u"] < target.goal < target.ceiling
    twice, thrice = targets.H100.gemm * 2, targets.H100.memory * 3
    for per_card, factor in ((targets.prefill_targets, 2), (targets.decode_targets, 3)):
        for other, known in zip(per_card(targets.Rates("another", twice, thrice)), per_card(), strict=True):
            assert other == pytest.approx((known.context, known.ceiling * factor, known.goal * factor, known.paper))
    assert [targets.kv_mebibytes("yoco_u", c) for c in (16384, 65536, 262144)] == [62, 158, 542]


def test_the_full_scale_is_the_papers() -> None:
    assert set(FULL.check_presets) == set(STAGES)
    assert FULL.contexts == tuple(targets.DECODE) and FULL.batch == targets.BATCH
    assert (FULL.steps, FULL.block_size, FULL.size, FULL.architectures[0]) == (128, 256, "1.3b", "yoco_u")
    assert FULL.attention_shapes[-1] == (20, 4, 128)


def stub_gpu(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """A GPU that torch sees, as far as `check_device` asks."""
    values = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "NVIDIA H100"} | functions
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(machine, "find_device", lambda name: torch.device(name))
    monkeypatch.setattr(machine, "find_spec", lambda name: object())
    monkeypatch.setattr(machine, "environment", lambda device: {"device_name": "NVIDIA H100"})


def test_a_machine_that_cannot_be_measured_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "machine.json")
    machine.check_device("cpu", record)
    with monkeypatch.context() as patch:
        stub_gpu(patch)
        machine.check_device("cuda", record)
    stub_gpu(monkeypatch, is_available=False)
    with pytest.raises(UserError, match=r"torch sees no GPU; .*--dry"):
        machine.check_device("cuda", record)
    stub_gpu(monkeypatch, get_device_capability=(7, 0), get_device_name="Tesla V100")
    with pytest.raises(UserError, match="Tesla V100 has no bfloat16"):
        machine.check_device("cuda", record)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        machine.check_device("cuda", record)
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    with pytest.raises(UserError, match=r"torch is 2.10.0\+cu128; expected 2.11 or later"):
        machine.check_device("cuda", record)


def test_figures_of_two_cards_are_not_mixed(tmp_path: Path) -> None:
    record = Record(tmp_path / "machine.json")
    record.keep("environment", {"device_name": "NVIDIA H200"})
    with pytest.raises(UserError, match=r"holds figures of NVIDIA H200, but this is .*; give another --out"):
        machine.check_device("cpu", record)


def test_a_profile_without_kernels_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        profiling.profiled(torch.device("cpu"), lambda: None)


@pytest.mark.parametrize(("ways", "rate"), [({"eager": 1.0, "compiled": 2.0}, 50.0), ({"eager": 1.0}, None)])
def test_a_figure_of_compiled_decoding_is_of_nothing_else(tmp_path: Path, ways: dict[str, float], rate: float | None) -> None:
    record = Record(tmp_path / "phase.json")
    record.keep("one", {"tokens_per_second": 100.0, "seconds": [1.0], "way": "eager", "seconds_by_way": ways})
    peers.only_compiled(record, "one")
    assert record.figures["one"].get("tokens_per_second") == rate
    assert ("failure" in record.figures["one"]) == (rate is None)


def test_the_text_comparison_goes_on_in_a_later_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["not finished: a\nnot finished: b\n", ""]

    def experiment(command: list[str], **_: Any) -> SimpleNamespace:
        text = said.pop(0)
        if not text:
            (tmp_path / "text").mkdir()
            (tmp_path / "text" / "report.json").write_text("{}")
        return SimpleNamespace(returncode=0, stdout="", stderr=text)

    monkeypatch.setattr(texts.subprocess, "run", experiment)
    for finished in (False, True):
        record = Record(tmp_path / "text.json", time.time() + 1000)
        record.retry_failures()
        texts.run(record, FULL)
        record.finish()
        assert Record(tmp_path / "text.json").is_done == finished
    assert set(record.figures) == {"runs", "report"} and not said
