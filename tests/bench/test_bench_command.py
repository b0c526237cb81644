"""`yoco-u bench` end to end on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from forked import SUBPROCESS

from yoco_u.architecture import preset
from yoco_u.bench import engines, paper_tables, process
from yoco_u.bench import run as run_module
from yoco_u.bench.cases import BenchSettings
from yoco_u.bench.ceilings import Ceilings
from yoco_u.bench.run import Benchmark
from yoco_u.cli import main
from yoco_u.cli.bench import _report
from yoco_u.model import YocoUConfig, YocoUForCausalLM

TINY = ("--size", "test", "--contexts", "32,64", "--batches", "1,2", "--rounds", "1")


@pytest.fixture(autouse=True)
def _forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_engines.py` starts workers as the command does."""
    monkeypatch.setattr(process, "subprocess", SUBPROCESS)


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure_ceilings", lambda dtype, device: Ceilings(1e12, 1e10))


def test_table_json_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ("--json", f"{tmp_path}/bench.json", "--plot", f"{tmp_path}/bench.png")
    options = ("--quick", "--architectures", "yoco_u,rins", "--peers", "transformers")
    assert main(["bench", *TINY, *options, *files]) == 0
    shown = capsys.readouterr().out
    for part in ("Prefill", "Decode", "context 64, batch 2", "rins", "llama in transformers", "ratio"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "CPUs busy" not in shown
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {"environment", "settings", "ceilings", "engines", "rows"} <= set(found)
    assert len(found["rows"]) == 3 * (2 + 4)
    assert all(row["failure"] is None and row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 for row in found["rows"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_busy_machine_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure_ceilings", lambda dtype, device: Ceilings(1e12, 1e10, busy=0.9))
    options = ("--size", "test", "--architectures", "yoco", "--contexts", "32", "--batches", "1", "--rounds", "1")
    assert main(["bench", *options, "--peers", "none"]) == 0
    assert "kept up to 0.9 CPUs busy" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    YocoUForCausalLM(YocoUConfig.from_architecture(preset("yoco_u", "test"))).save_pretrained(tmp_path / "mine")
    options = ("--contexts", "32", "--batches", "1", "--rounds", "1", "--peers", "none", "--num-loops", "2")
    assert main(["bench", "--model", f"{tmp_path}/mine", *options, "--json", f"{tmp_path}/bench.json"]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["engines"]) == ["mine"]
    assert found["engines"]["mine"]["architecture"]["stages"][0]["loops"] == 2
    assert [row["failure"] for row in found["rows"]] == [None, None]


def test_paper(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_tables, "CHUNK", 256)  # 2,048 take a Transformer seconds
    options = ("--size", "test", "--contexts", "2048,4096", "--rounds", "1")
    assert main(["bench", "--paper", *options, "--json", f"{tmp_path}/bench.json"]) == 0
    shown = capsys.readouterr().out
    for part in ("Table 8", "Table 9", "Table 10", "4K"):
        assert part in shown
    tables = json.loads((tmp_path / "bench.json").read_text())["paper"]
    assert set(tables["prefill_tokens_per_second"]["ours"]["4096"]) == {"transformer", "yoco", "rins", "yoco_u"}


OUTPUTS = ("yoco_u.bench.table.print_tables", "yoco_u.files.write_result", "yoco_u.bench.plot.write_plot")


@pytest.mark.parametrize("failing", OUTPUTS)
def test_where_one_output_fails_the_others_are_there(failing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = []

    def output(name: str) -> None:
        if name == failing:
            raise OSError("no space left on the device")
        done.append(name)

    for name in OUTPUTS:
        monkeypatch.setattr(name, lambda *_, name=name: output(name))
    benchmark = Benchmark(BenchSettings(), [], {})
    benchmark.measurement.ceilings.append(Ceilings(1e12, 1e10))
    with pytest.raises(OSError, match="no space"):
        _report(benchmark, [], False, tmp_path / "bench.json", tmp_path / "bench.png")
    assert done == [name for name in OUTPUTS if name != failing]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--architectures", "yoco_x"), "unknown preset 'yoco_x'"),
        (("--size", "9b"), "unknown size '9b'"),
        (("--contexts", "many"), "--contexts is 'many'"),
        (("--contexts", "0"), "contexts"),
        (("--dtype", "int4"), "dtype"),
        (("--model", "nowhere/at/all"), "no such folder"),
        (("--model", "a", "--size", "test"), "--model measures one checkpoint"),
        (("--paper", "--architectures", "yoco"), "--paper"),
        (("--paper", "--plot", "a.png"), "--plot"),
        (("--device", "meta"), "device 'meta' computes nothing; expected auto, cpu or a GPU of this machine"),
        (("--device", "gpu"), "device 'gpu' cannot be used"),
        (("--peers", "vlm"), "did you mean vllm"),
        (("--peer-python", "vllm"), "PEER=PYTHON"),
        (("--peer-python", "vllm=/no/such/python"), "no such program"),
        (("--json", "no/such/folder/bench.json"), "no such folder"),
        (("--time-limit", "0"), "--time-limit"),
        (("--paper", "--batches", "1,16"), "--paper measures one batch"),
        (("--architectures", "transformer,yoco", "--num-loops", "5", "--peers", "none"), "none of transformer, yoco loops"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_engine_that_fails_is_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.PEERS, "transformers", engines.PEERS["transformers"]._replace(script="nowhere.py"))
    assert main(["bench", *TINY, "--architectures", "yoco_u", "--peers", "transformers"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "transformers" in line]
    assert ["llama", "in", "transformers", "failed"] in [line[:4] for line in lines]
    assert "could not start" in " ".join(lines[-1])
