"""The paper's tables beside ours: the paper's figures, and the time of a prompt from that of chunks at several depths."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from yoco_u.architecture import preset
from yoco_u.bench.cases import BenchSettings, Decode, Prefill
from yoco_u.bench.ceilings import Ceilings
from yoco_u.bench.engines import our_engines
from yoco_u.bench.paper_tables import (
    CHUNK,
    PAPER,
    PAPER_ON_GPU,
    our_figures,
    paper_cases,
    print_paper_tables,
    whole_prefill_seconds,
)
from yoco_u.bench.run import CaseResult, Measurement
from yoco_u.budget import kv_bytes, parameters, prefill_flops
from yoco_u.paper import KV_MEBIBYTES


def test_the_papers_kv_figures_are_the_computed_ones() -> None:
    for context, values in KV_MEBIBYTES.items():
        for name, mebibytes in values.items():
            assert kv_bytes(preset(name, "1.3b"), context) == mebibytes * 2**20


@pytest.mark.parametrize("name", ["transformer", "yoco_u"])
@pytest.mark.parametrize("context", [CHUNK, 4 * CHUNK, 4 * CHUNK + 100])
def test_a_prompt_from_its_chunks(name: str, context: int) -> None:
    """With a chunk's model FLOPs as its seconds, which grow linearly with its depth, the sum is the FLOPs of the prompt."""
    a = preset(name, "test")
    depths = [0, *([2 * CHUNK] if context > CHUNK else []), *([context - CHUNK] if context > CHUNK else [])]
    depths = sorted(set(depths))
    head = prefill_flops(a, 1) - (prefill_flops(a, 2) - prefill_flops(a, 1))

    def seconds(depth: int) -> float:
        return prefill_flops(a, depth + CHUNK) - (prefill_flops(a, depth) if depth else head)

    found = whole_prefill_seconds(context, CHUNK, depths, [seconds(depth) for depth in depths])
    assert found == pytest.approx(prefill_flops(a, context), rel=0.02)


@given(st.sets(st.integers(1, 9 * CHUNK), min_size=1, max_size=3), st.floats(0, 1e-3))
def test_of_chunks_whose_time_grows_with_their_depth_every_context_is_exact(contexts: set[int], slope: float) -> None:
    """Whether or not the contexts are multiples of a chunk; the chunks of a prompt are summed one by one here."""
    settings = BenchSettings(architectures=("transformer",), size="test", contexts=tuple(contexts), batches=(1,))
    [engine] = our_engines(settings)
    results = {}
    for case in paper_cases(engine.architecture, settings, memory=0):
        seconds = [1 + slope * case.depth] if isinstance(case, Prefill) else [1.0]
        results[engine.name, case] = CaseResult(engine, case, 0, seconds)
    prefill, _, _ = our_figures(Measurement(settings, results, [Ceilings(1e12, 1e10)]))
    for context in contexts:
        begins = range(0, context, CHUNK)
        exact = sum((1 + slope * begin) * min(CHUNK, context - begin) / CHUNK for begin in begins)
        assert prefill[context][engine.name] == pytest.approx(context / exact)


def test_cases_cover_every_context() -> None:
    settings = BenchSettings(contexts=(16384, 8192), batches=(2,), steps=32)
    cases = paper_cases(preset("yoco_u", "test"), settings, memory=0)
    assert cases == [Prefill(CHUNK, 0), Prefill(CHUNK, 6144), Prefill(CHUNK, 14336), Decode(8192, 2, 32), Decode(16384, 2, 32)]


def test_tables() -> None:
    settings = BenchSettings(**PAPER | {"size": "1.3b", "contexts": (8192, 16384)})
    results = {}
    for engine in our_engines(settings):
        for case in paper_cases(engine.architecture, settings, memory=0):
            result = CaseResult(engine, case, kv_bytes(engine.architecture, case.context))
            if engine.name != "rins":
                result.seconds = [0.1, 2.0 if engine.name == "transformer" else 1.0, 9.0]
            else:
                result.failure = "no memory: not enough"
            results[engine.name, case] = result
    measurement = Measurement(settings, results, [Ceilings(1e12, 1e10)])
    prefill, decode, kv = our_figures(measurement)
    assert prefill[8192] == {"transformer": CHUNK / 2, "yoco": CHUNK, "yoco_u": CHUNK}
    assert decode[16384] == {"transformer": 16, "yoco": 32, "yoco_u": 32}
    assert kv[16384] == {"transformer": 640, "yoco": 42, "rins": 1280, "yoco_u": 62}
    text = io.StringIO()
    print_paper_tables(Console(file=text, width=120), measurement)
    lines = {line.split()[0]: line.split() for line in text.getvalue().splitlines() if line.strip().startswith(("8K", "16K"))}
    assert lines["16K"] == ["16K", "640", "(640)", "42", "1,280", "(1,280)", "62", "(62)"]
    assert "2.00x (1.14x)" in text.getvalue()  # prefill at 16K: YOCO-U over Transformer, here and in the paper
    assert "8K" in lines


@pytest.mark.parametrize(
    ("gibibytes", "batches"),
    [
        (24, {"yoco_u": (32, 32, 32, 32), "yoco": (32, 32, 32, 32), "transformer": (32, 28, 7, 1), "rins": (27, 14, 3, 1)}),
        (79, {"yoco_u": (32, 32, 32, 32), "yoco": (32, 32, 32, 32), "transformer": (32, 32, 25, 6), "rins": (32, 32, 12, 3)}),
        (140, {"yoco_u": (32, 32, 32, 32), "yoco": (32, 32, 32, 32), "transformer": (32, 32, 32, 11), "rins": (32, 32, 23, 5)}),
    ],
    ids=["24 GB", "H100", "H200"],
)
def test_on_a_gpu_batches_are_the_papers_where_they_fit(gibibytes: int, batches: dict[str, tuple[int, ...]]) -> None:
    """Of 79 GiB the weights take 2.5, and keys and values may take 65: 25 sequences of 2.5 GiB, or 6 of 10."""
    settings = BenchSettings(**PAPER_ON_GPU, device="cuda")
    for engine in our_engines(settings):
        cases = paper_cases(engine.architecture, settings, gibibytes * 2**30)
        assert [case for case in cases if isinstance(case, Prefill)] == [Prefill(2**power) for power in (13, 14, 16, 18)]
        decodes = [case for case in cases if isinstance(case, Decode)]
        assert [(case.context, case.steps) for case in decodes] == [(2**power, 128) for power in (13, 14, 16, 18)]
        assert tuple(case.batch for case in decodes) == batches[engine.name]
        weights = 2 * parameters(engine.architecture).total
        for case in decodes:
            taken = weights + case.batch * kv_bytes(engine.architecture, case.context + case.steps + 2 * settings.block_size)
            assert case.batch == 1 or taken < 0.9 * gibibytes * 2**30  # activations need the rest


def test_tables_of_a_gpu() -> None:
    """Whole prompts need no interpolation, and a batch that did not fit is told."""
    settings = BenchSettings(**PAPER_ON_GPU, device="cuda")
    results = {}
    for engine in our_engines(settings):
        for case in paper_cases(engine.architecture, settings, 79 * 2**30):
            seconds = [case.context / 1e5] if isinstance(case, Prefill) else [2.0]
            results[engine.name, case] = CaseResult(
                engine, case, case.batch * kv_bytes(engine.architecture, case.context), seconds
            )
    measurement = Measurement(settings, results, [Ceilings(1e15, 3e12)])
    prefill, decode, kv = our_figures(measurement)
    assert prefill[262144] == pytest.approx(dict.fromkeys(PAPER_ON_GPU["architectures"], 1e5))
    assert decode[262144] == {"yoco_u": 32 * 128 / 2, "yoco": 32 * 128 / 2, "transformer": 6 * 128 / 2, "rins": 3 * 128 / 2}
    assert {context: kv[context]["yoco_u"] for context in kv} == {8192: 46, 16384: 62, 65536: 158, 262144: 542}
    text = io.StringIO()
    print_paper_tables(Console(file=text, width=200), measurement)
    shown = " ".join(text.getvalue().split())
    assert "batch 32" in shown
    assert "transformer 256K in batches of 6" in shown
