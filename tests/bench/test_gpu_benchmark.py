"""`benchmarks/gpu.py` around its phases: processes and their limits, going on after an interruption, what is told."""

import io
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from gpu_phases import conductor, report, session, wheels
from gpu_phases.check import verdict
from gpu_phases.conductor import Conductor, Phase
from gpu_phases.record import BROKEN, Record
from gpu_phases.targets import DECODE
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from rich.console import Console

SCRIPT = """\
import json, subprocess, sys, time
from pathlib import Path
name, folder, until, *dry = sys.argv[1:]
assert abs(float(until) - time.time()) < 10_000
with open(f"{folder}/calls", "a") as calls:
    calls.write(name + " ".join(dry) + "\\n")
figure = {"failure": "too hot"} if name == "hot" else {"value": 1}
Path(f"{folder}/{name}.json").write_text(json.dumps({"complete": name != "slow", "figures": {"one": figure}}))
if name == "slow":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(f"{folder}/pid").write_text(str(child.pid))
    Path(f"{folder}/pid").rename(f"{folder}/child")
    time.sleep(600)
sys.exit({"broken": 1, "mistaken": 2, "cracked": 0 if "--go-on" in dry else 3}.get(name, 0))
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conductor:
    """Phases whose whole work is the script above, in its own package of the same name."""
    package = tmp_path / "scripts" / "gpu_phases"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(SCRIPT)
    monkeypatch.setattr(conductor, "FOLDER", tmp_path / "scripts")
    monkeypatch.setattr(conductor, "_TO_END", 0.0)
    (tmp_path / "out").mkdir()
    return Conductor(tmp_path / "out", 10**6, dry=True)


def calls(subject: Conductor) -> list[str]:
    return (subject.out / "calls").read_text().split("\n")[:-1]


def test_how_phases_end(scripted: Conductor) -> None:
    ends = {name: scripted.run(Phase(name, 600, 1)) for name in ("good", "broken", "mistaken")}
    assert ends == {"good": "done", "broken": "failed", "mistaken": "mistake"}
    assert calls(scripted) == ["good--dry", "broken--dry", "mistaken--dry"]
    assert Conductor(scripted.out, 50, dry=True).run(Phase("large", 900, 60)) == "left out"


def test_behind_a_broken_gpu_another_process_goes_on(scripted: Conductor) -> None:
    assert scripted.run(Phase("cracked", 600, 1)) == "done"
    assert calls(scripted) == ["cracked--dry", "cracked--dry --go-on"]


def test_what_is_done_is_not_run_again_and_what_failed_is(scripted: Conductor) -> None:
    for _ in range(2):
        for name in ("good", "hot"):
            assert scripted.run(Phase(name, 600, 1)) == "done"
    assert calls(scripted) == ["good--dry", "hot--dry", "hot--dry"]


def test_a_phase_is_killed_with_its_children_and_its_figures_stay(scripted: Conductor) -> None:
    child, limit = scripted.out / "child", 5
    while not child.exists():  # a machine with other work may need more than the limit to start Python
        assert scripted.run(Phase("slow", limit, 1)) == "out of time"
        limit *= 2
    assert scripted.record("slow").figures == {"one": {"value": 1}}
    while runs(int(child.read_text())):  # a killed process ends in its own time
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_record_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of luck\nat line 3")

    record = Record(tmp_path / "a" / "phase.json", time.time() + 100)
    assert record.measure("one", lambda: {"value": 1})["value"] == 1
    assert record.measure("two", fails)["failure"] == "RuntimeError: out of luck"
    assert record.measure("three", dict, least=1000)["failure"].startswith("left out: ")
    record.finish()
    assert "one: value 1" in capsys.readouterr().out

    again = Record(tmp_path / "a" / "phase.json")
    assert again.complete and not again.is_done
    again.retry_failures()
    assert [name for name in again.figures if again.is_due(name)] == ["two", "three"]
    assert again.measure("one", fails)["value"] == 1
    again.measure("two", dict)
    again.measure("three", dict)
    again.finish()
    assert again.is_done


def test_the_process_that_broke_its_gpu_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one tries what was still to be tried, and not what has broken the GPU."""

    def fails(*_: Any) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    def end(status: int) -> None:
        raise SystemExit(status)

    earlier = Record(tmp_path / "phase.json")
    for name in ("one", "two", "three"):
        earlier.measure(name, fails)  # no GPU is in use, so none is broken
    record = Record(tmp_path / "phase.json")
    record.retry_failures()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", end)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        assert "illegal" in record.measure("one", fails)["failure"]
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    record.measure("two", dict)
    with pytest.raises(SystemExit) as ended:
        record.measure("four", fails)
    assert ended.value.code == BROKEN
    next_one = Record(tmp_path / "phase.json")
    assert [name for name in ("one", "two", "three", "four", "five") if next_one.is_due(name)] == ["three", "five"]
    next_one.measure("three", dict)
    next_one.finish()
    assert [name for name in next_one.figures if Record(next_one.path).is_due(name)] == []


def test_what_is_not_finite_is_kept_as_wrong_and_checked_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "phase.json")
    for name, error in (("one", math.inf), ("two", math.nan)):
        assert record.measure(name, partial(verdict, error, 4.0, where="here", all=[error]))["wrong"]
    assert record.measure("three", lambda: verdict(5.0, 4.0))["wrong"]
    assert not record.measure("four", lambda: verdict(3.0, 4.0))["wrong"]
    record.finish()
    again = Record(tmp_path / "phase.json")
    assert again.figures["one"]["error"] is None and not again.is_done
    again.retry_failures()
    assert [name for name in again.figures if not again.is_due(name)] == ["four"]


OUTCOMES = st.sampled_from(["right", "wrong", "failed", "no time"])
CALLS = st.tuples(st.lists(OUTCOMES, min_size=3, max_size=3), st.sampled_from([0, 1, 2, None]))


@settings(max_examples=30)
@given(st.lists(CALLS, min_size=1, max_size=3))
def test_no_failure_is_forgotten_until_it_is_measured_again(calls: list[tuple[list[str], int | None]]) -> None:
    """Over calls that go on where the last one stopped; a call with a number is killed behind so many figures."""
    with tempfile.TemporaryDirectory() as folder:
        conductor, known, complete = Conductor(Path(folder), 60, dry=True), dict[str, str](), False
        for outcomes, killed_behind in calls:
            record = Record(Path(folder) / "correctness.json", time.time() + 1000)
            record.retry_failures()
            due = [(name, outcome) for name, outcome in zip("abc", outcomes, strict=True) if known.get(name) != "right"]
            for name, outcome in due[:killed_behind]:
                record.measure(name, partial(a_check, outcome), least=9999 if outcome == "no time" else 0)
                if name not in known or outcome != "no time":
                    known[name], complete = outcome, False
            if killed_behind is None:
                record.finish()
                complete = True
            found = conductor.record("correctness")
            assert (found.complete, found.is_done) == (complete, complete and set(known.values()) == {"right"})
            told = {line.partition(":")[0] for line in session._wrong(conductor, "done") if known}
            assert told == {name for name, outcome in known.items() if outcome in ("wrong", "failed")}


def a_check(outcome: str) -> dict[str, Any]:
    if outcome == "failed":
        raise RuntimeError("out of luck")
    return verdict(9.0 if outcome == "wrong" else 0.0, 1.0)


def test_figures_that_are_not_asked_for_any_more_go(tmp_path: Path) -> None:
    record = checked(tmp_path, renamed={"failure": "too hot"}, kept={"value": 1}).record("correctness")
    record.retry_failures()
    record.measure("new", dict)
    record.finish()
    assert list(Record(record.path).figures) == ["kept", "new"]


def checked(folder: Path, **figures: dict[str, Any]) -> Conductor:
    record = Record(folder / "correctness.json")
    for name, figure in figures.items():
        record.keep(name, figure)
    return Conductor(folder, 100, dry=True)


def test_what_is_wrong_ends_the_call_with_a_line_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(
        tmp_path,
        right={"error": 0.1, "limit": 0.2, "wrong": False},
        first={"error": 0.30001, "limit": 0.2, "wrong": True, "where": "model.norm.weight"},
        second={"failure": "OutOfMemoryError: 80 GiB"},
        fourth={"error": math.inf, "limit": 0.2, "wrong": True},
        third={"failure": "left out: 3 s remained of the phase"},
    )
    run: list[str] = []
    monkeypatch.setattr(Conductor, "run", lambda self, phase: run.append(phase.name) or "done")
    assert session.run_phases(None, tmp_path, tmp_path, 100, dry=True) == 1
    assert run == ["machine", "correctness"]
    lines = capsys.readouterr().out.splitlines()
    assert "  first: error 0.3, at most 0.2 is right in model.norm.weight" in lines
    assert "  second: OutOfMemoryError: 80 GiB" in lines
    assert "  fourth: error not finite, at most 0.2 is right" in lines
    assert not any("third: left out: 3" in line for line in lines[-3:])
    assert any("--phases tables,profiling,training,peers,text measures in spite of it" in line for line in lines)


def test_no_check_at_all_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conductor, "run", lambda self, phase: "failed" if phase.name == "correctness" else "done")
    assert session.run_phases("correctness,tables", tmp_path, tmp_path, 100, dry=True) == 1


def test_checks_that_died_behind_right_ones_end_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(tmp_path, right={"error": 0.1, "limit": 0.2, "wrong": False})
    run: list[str] = []
    monkeypatch.setattr(
        Conductor, "run", lambda self, phase: run.append(phase.name) or "failed" if phase.name == "correctness" else "done"
    )
    assert session.run_phases("correctness,tables", tmp_path, tmp_path, 100, dry=True) == 1
    assert run == ["correctness"]


def test_what_is_right_lets_the_call_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(tmp_path, right={"error": 0.1, "limit": 0.2, "wrong": False})
    run: list[str] = []
    monkeypatch.setattr(Conductor, "run", lambda self, phase: run.append(phase.name) or "done")
    assert session.run_phases(None, tmp_path, tmp_path, 100, dry=True) == 0
    assert run == [phase.name for phase in conductor.PHASES]


def test_an_unknown_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.run_phases("table", tmp_path, tmp_path, 100, dry=True) == 2
    assert capsys.readouterr().err == "error: unknown phase 'table': did you mean tables?\n"


def figure(engine: str, kind: str, context: int, rate: float, batch: int = 32) -> dict[str, Any]:
    return {"engine": engine, "kind": kind, "context": context, "tokens_per_second": rate, "batch": batch}


@pytest.mark.parametrize(
    ("memory", "rates", "shown"),
    [
        (
            {"copy_bytes_per_second": 6e12},
            ("NVIDIA H200", 800e12, 6e12),
            ["NVIDIA H200: 800 TFLOP/s, 6 TB/s", "150,000 141,772 106% 239,309 75,637", "225 900 25% 1,082 303"],
        ),
        (
            {"failure": "OutOfMemoryError"},
            ("an H100", 790e12, 3e12),
            ["an H100: 790 TFLOP/s, 3 TB/s", "150,000 140,000 107% 236,317 75,637", "225 450 50% 541 303"],
        ),
    ],
    ids=["measured", "not measured"],
)
def test_the_result_and_its_tables(
    memory: dict[str, Any], rates: tuple[str, float, float], shown: list[str], tmp_path: Path
) -> None:
    """Beside targets by the rates of the card, or by an H100's where they were not measured; the title says which."""
    subject = Conductor(tmp_path, 100, dry=True)
    for phase, figures in {
        "machine": {
            "environment": {"device_name": "NVIDIA H200"},
            "matrix products": {"mean_flops_per_second": 800e12},
            "memory": memory,
        },
        "tables": {
            "a": figure("yoco_u", "prefill", 8192, 150_000.0, 1),
            "b": figure("yoco_u", "decode", 262144, 225.0),
            "c": figure("yoco_u", "decode", 65536, 9999.0, batch=16),
            "d": figure("transformer", "decode", 262144, 90.0, batch=6),
            "e": {"failure": "no memory: too much"},
        },
        "training": {
            "yoco_u 1.3b, length 8192, compiled": {"model_flops_per_second": 440e12, "tokens_per_second": 3e4},
            "llama 1.3b, length 8192, compiled": {"model_flops_per_second": 320e12, "tokens_per_second": 3e4},
            "llama 1.3b, length 8192": {"model_flops_per_second": 220e12, "tokens_per_second": 2e4},
        },
    }.items():
        record = subject.record(phase)
        for name, one in figures.items():
            record.keep(name, one)
    (tmp_path / "profile.txt").write_text("kernels")
    path = report.write(subject, tmp_path / "results")
    assert path.name == "gpu-nvidia-h200.json"
    assert path.with_name("gpu-nvidia-h200-profile.txt").read_text().endswith(".\n\nkernels")
    found = json.loads(path.read_text())
    measured = {row["what"]: row["measured"] for row in found["targets"]}
    assert tuple(found["rates"].values()) == rates
    assert len(measured) == 2 * len(DECODE) + 2
    assert measured["prefill at 8K, tokens/s"] == 150_000
    assert measured["decode at 256K, tokens/s"] == 225
    assert measured["decode at 64K, tokens/s"] is None  # of another batch than the target's
    assert measured["training of 1.3B, share of GEMM"] == pytest.approx(0.55)
    assert measured["training of 1.3B, over transformers' Llama"] == pytest.approx(440 / 320)  # the faster of its two ways
    text = io.StringIO()
    report.show(found["phases"], Console(file=text, width=150))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    for line, figures_of_it in zip(
        ("YOCO-U beside the targets for", "prefill at 8K, tokens/s", "decode at 256K, tokens/s"), shown, strict=True
    ):
        assert f"{line} {figures_of_it}" in lines
    assert "decode at 256K 225 90 (6)" in lines


def test_wheels_come_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with zipfile.ZipFile(tmp_path / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_along-1.0.dist-info"
        wheel.writestr("carried_along.py", "value = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    before = list(sys.path)
    with wheels.use_wheels(tmp_path):
        import carried_along  # type: ignore[import-not-found]

        assert carried_along.value == 7
    assert sys.path == before
    with wheels.use_wheels(tmp_path / "nowhere"):
        assert sys.path == before
    (tmp_path / "carried_along-1.0-py3-none-any.whl").rename(tmp_path / "carried_along-1.0-cp399-cp399-any.whl")
    with pytest.raises(wheels.CannotInstall, match=r"do not fit .*not a supported wheel"), wheels.use_wheels(tmp_path):
        pass


def test_before_the_wheels_nothing_is_imported_that_needs_them() -> None:
    code = "import sys, gpu_phases.wheels; sys.exit(any(name in sys.modules for name in ('yoco_u', 'wrapt', 'pydantic')))"
    folder = Path(wheels.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0


def test_wheels_are_of_the_versions_tested_and_need_no_others() -> None:
    root = Path(report.__file__).parents[2]
    tested, carried = (
        dict(line.split("==") for line in (root / name).read_text().splitlines() if "==" in line)
        for name in ("constraints.txt", "benchmarks/gpu_wheels.txt")
    )
    for name in ("pydantic", "wrapt"):
        assert carried[name] == tested[name]
        for need in map(Requirement, requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert carried[need.name.replace("_", "-")] in need.specifier


def test_a_worker_whose_gpu_broke_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of which the GPU recovers is told and the worker goes on; after any other it ends."""
    sys.path.append(str(Path(report.__file__).parents[2] / "yoco_u" / "bench" / "workers"))
    from gpu_case import measured  # type: ignore[import-not-found]

    def fail(*_: Any) -> Any:
        raise RuntimeError("illegal memory access")

    def end(status: int) -> None:
        raise SystemExit(status)

    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 5)
    monkeypatch.setattr("os._exit", end)
    assert measured("cpu", lambda: {"seconds": 1}) == {"seconds": 1}
    assert measured("cuda", lambda: {"seconds": 1}) == {"seconds": 1, "gpu_peak_bytes": 5}
    with pytest.raises(RuntimeError):
        measured("cuda:0", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(SystemExit):
        measured("cuda:0", fail)
