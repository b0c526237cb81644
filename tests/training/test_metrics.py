"""The metrics of a run: their values, and where they are written."""

import errno
import hashlib
import importlib.util
import json
import math
import re
import shutil
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from failing_disk import failing_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import STEPS, run_config

from yoco_u import YocoUForCausalLM, budget
from yoco_u.data import DatasetIndex, PackedDataset
from yoco_u.device import gemm_rate
from yoco_u.errors import UserError
from yoco_u.training import evaluate, read_metrics, train, trainer
from yoco_u.training.distributed import Distributed
from yoco_u.training.metrics import MetricsWriter
from yoco_u.training.validation import text_digest

SPEED = {"gradient_norm": 1.0, "learning_rate": 0.01, "tokens_per_second": 100.0, "mfu": 0.5, "seconds": 1.0}
ALONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics") / "run"
    small = {"initializer_range": 0.02}  # with small weights all logits are nearly equal at first
    train(run_config(dataset).model_copy(update=small), folder, progress=False)
    return folder


def test_a_run_notes_what_it_is_evaluated_on(run: Path, dataset: Path) -> None:
    """The tokens of the rows, however long these are; by one token more or less it is another text."""
    length, asked = DatasetIndex.load(dataset).split("validation").tokens, run_config(dataset).training.evaluation_tokens
    stream = PackedDataset(dataset, "validation", length - 1, shuffle=False).row(0).astype("<u4")
    noted = json.loads((run / "environment.json").read_text())["validation"]
    assert noted == hashlib.sha256(stream[:asked].tobytes()).hexdigest()
    for row, most in product((8, 24), (1, 24, 25, 100, length, 10**9)):
        found = text_digest(PackedDataset(dataset, "validation", row, shuffle=False), most)
        assert found == hashlib.sha256(stream[: max(row, most)].tobytes()).hexdigest()


def test_the_records_of_a_run(run: Path, dataset: Path) -> None:
    records = read_metrics(run)
    steps = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evaluations] == [3, 6]
    tokens, flops = 4 * 24, budget.training_flops(run_config(dataset).architecture, 24)
    for record in records:
        assert record["tokens"] == record["step"] * tokens
        assert record["flops"] == pytest.approx(record["tokens"] * flops)
        split = DatasetIndex.load(dataset).split("train" if record["kind"] == "train" else "validation")
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2) * split.tokens / split.bytes)
    rate = json.loads((run / "environment.json").read_text())["gemm_flops_per_second"]
    for before, record in zip([{"seconds": 0.0}, *steps], steps, strict=False):
        seconds = record["seconds"] - before["seconds"]
        assert record["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert record["model_flops_per_second"] == pytest.approx(record["tokens_per_second"] * flops)
        assert record["mfu"] == pytest.approx(record["model_flops_per_second"] / rate)
        assert record["gradient_norm"] > 0
    assert steps[1]["learning_rate"] == 3e-3


@pytest.mark.parametrize(("dtype", "in_hardware", "warned"), [
    ("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False),
])  # fmt: skip
def test_slow_bfloat16_is_said(
    dtype: str, in_hardware: bool, warned: bool, dataset: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: in_hardware)
    monkeypatch.setattr(trainer, "gemm_rate", lambda device, dtype: 1e9)  # it would take long where that is not so
    train(run_config(dataset, steps=1, dtype=dtype, optimizer_warmup_steps=0, device="cpu"), tmp_path)
    assert ("training.dtype=float32 is faster" in capsys.readouterr().err) == warned


def test_the_first_loss_is_that_of_a_model_that_knows_nothing(run: Path) -> None:
    assert read_metrics(run)[0]["loss"] == pytest.approx(math.log(300), rel=0.02)


def test_the_run_folder_explains_itself(run: Path) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    expected = {"config.yaml", "environment.json", "tokenizer", "metrics.jsonl", "tensorboard", "checkpoints", "model"}
    assert names == expected | {"summary.json"}
    summary = json.loads((run / "summary.json").read_text())
    last = read_metrics(run)[-1]
    assert summary["validation"] == {key: last[key] for key in ("loss", "perplexity", "bits_per_byte")}
    weights = YocoUForCausalLM.from_pretrained(run / "model").state_dict()
    assert summary["parameters"] == sum(tensor.numel() for name, tensor in weights.items() if "choice_bias" not in name)


def test_tensorboard_has_the_same_figures(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(record["step"], record["loss"]) for record in read_metrics(run) if record["kind"] == "train"]
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]


@pytest.mark.parametrize("max_tokens", [1, 24 * 5 + 7, None])
def test_evaluation_is_the_mean_over_the_first_rows(run: Path, dataset: Path, max_tokens: int | None) -> None:
    model = YocoUForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    validation = PackedDataset(dataset, "validation", 24, shuffle=False)
    rows = {1: 1, 24 * 5 + 7: 5, None: validation.rows_per_epoch}[max_tokens]
    losses = []
    for index in range(rows):
        row = torch.from_numpy(validation.row(index))
        start = 0
        for end in [*range(1, 24), 24]:  # the model must see each document by itself
            if end == 24 or row[end] == validation.index.eot_id:
                logits = model(row[None, start:end]).logits[0]
                losses += F.cross_entropy(logits, row[start + 1 : end + 1], reduction="none").tolist()
                start = end
    expected = sum(losses) / len(losses)
    model.train()
    for batch_rows in (1, 4, 64):
        found = evaluate(model, validation, max_tokens, batch_rows, ALONE, dtype="float32")
        assert model.training
        assert found.tokens == len(losses) == rows * 24
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_evaluation_at_another_loop_count(run: Path, dataset: Path) -> None:
    model = YocoUForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    validation = PackedDataset(dataset, "validation", 24, shuffle=False)
    by_loops = {n: evaluate(model, validation, None, 4, ALONE, "float32", num_loops=n).loss for n in (None, 1, 3)}
    assert by_loops[None] == by_loops[3] != by_loops[1]


def test_progress_is_plain_lines_where_there_is_no_terminal(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run_config(dataset), tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "step 6/6  loss " in printed.err and "tokens/s  MFU" in printed.err
    assert "step 6  validation loss " in printed.err and "bits per byte" in printed.err
    (tmp_path / "summary.json").unlink()
    train(run_config(dataset), tmp_path)
    assert f"continuing from {tmp_path}/checkpoints/step-00000006" in capsys.readouterr().err.replace("\n", "")


def test_text_that_is_read_again_is_told(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = PackedDataset(dataset, "train", 24)
    for times, told in ((1, False), (2, True)):
        rows = times * split.rows_per_epoch
        train(
            run_config(dataset, steps=1, batch_rows=rows, micro_batch_rows=rows, optimizer_warmup_steps=0),
            tmp_path / str(times),
        )
        assert ("tokens: read 2.0 times" in capsys.readouterr().err.replace("\n", " ")) == told


def test_wandb_is_asked_for_and_not_there(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb_project is 'loops' but wandb is not installed; pip install 'yoco-u\[wandb\]'"):
        train(run_config(dataset, wandb_project="loops"), tmp_path, progress=False)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="a stand-in where wandb is not installed")
def test_wandb_gets_the_same_figures_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    axes: dict[str, str | None] = {}
    kept: list[dict[str, Any]] = []
    last = 0  # W&B's own step, which counts calls of `log` over all starts; what has a lower one is dropped

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
            axes[name] = step_metric

        def log(self, figures: dict[str, Any], step: int | None = None) -> None:
            nonlocal last
            step = last + 1 if step is None else step
            if step > last:
                last = step
                kept.append(figures)

        def finish(self) -> None: ...

    def init(**settings: Any) -> Run:
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    steps = []
    for resumed, losses in ((0, (3.0, 2.9, 2.8)), (1, (2.7, 2.6, 2.5))):  # killed after step 3, with a checkpoint of step 1
        writer = MetricsWriter(tmp_path, resumed, "loops", {"name": "run"})
        for step, loss in enumerate(losses, start=resumed + 1):
            writer.write({"kind": "train", "step": step, "tokens": 8, "flops": 8, "loss": loss} | SPEED)
            steps.append((step, loss))
        writer.close()
    assert axes == {"step": None, "*": "step"}
    assert [(figures["step"], figures["train/loss"]) for figures in kept] == steps
    assert started[0]["id"] == started[1]["id"] and started[1]["resume"] == "allow"
    for damaged in (b"", b"\xff", bytes(32), b"../other"):
        (tmp_path / "wandb-id").write_bytes(damaged)
        for _ in range(2):
            MetricsWriter(tmp_path, 0, "loops", {"name": "run"}).close()
        assert re.fullmatch("[0-9a-f]{32}", started[-1]["id"]) and started[-1]["id"] == started[-2]["id"]


def test_copies_of_a_run_have_ids_of_their_own_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str) -> str:
        MetricsWriter(tmp_path / name, 0, "loops", {}).close()
        return str(started[-1])

    started: list[str] = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda id, **_: started.append(id) or run))
    (tmp_path / "a").mkdir()
    first = start("a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert len({first, start("b"), start("c")}) == 3 and start("a") == first and start("b") == started[1]
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "d")
    assert start("d") not in started[:-1] and start("moved") == start("link") == first
    (tmp_path / "moved").rename(tmp_path / "again")
    assert start("again") == first
    shutil.copytree(tmp_path / "again", tmp_path / "restored")
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "restored").rename(tmp_path / "again")
    assert start("again") == first, "a copy that was put in its place"
    (tmp_path / "b" / "wandb-id").write_text(first)
    assert start("b") == start("b") == first, "the file of an earlier version"


def test_the_gemm_rate_is_a_rate() -> None:
    rate = gemm_rate(torch.device("cpu"), torch.float32, seconds=0.01)
    assert 1e8 < rate < 1e14


@pytest.mark.parametrize("name", ["mfu", "seconds", "tokens_per_second", "perplexity", "bits_per_byte"])
def test_a_figure_under_another_name_is_damage(run: Path, tmp_path: Path, name: str) -> None:
    """As of a flipped bit, which leaves the line valid JSON. Readers name it, and a run that goes on sets it aside."""
    text = (run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace(f'"{name}"', f'"{name[:-1]}"'))
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line \d+: .*{name} is missing"):
        read_metrics(tmp_path)
    MetricsWriter(tmp_path, STEPS).close()
    assert len(read_metrics(tmp_path)) < len(read_metrics(run)) and (tmp_path / "metrics.damaged.jsonl").exists()


@pytest.mark.parametrize("name", ["step", "tokens", "flops"])
@pytest.mark.parametrize("value", ["0", "0.0", "-1"])
def test_a_record_that_counts_nothing_is_damage(tmp_path: Path, name: str, value: str) -> None:
    """Reports divide by these."""
    record = {"kind": "train", "step": 1, "tokens": 1, "flops": 1, "loss": 1.0, **SPEED}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {name: json.loads(value)}) + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {name}: Input should be greater than 0"):
        read_metrics(tmp_path)


def test_mending_loses_nothing_on_a_full_disk(tmp_path: Path) -> None:
    """Whichever write fails: lines that are whole are there, and lines that are not are in a file of their own."""
    record = {"kind": "train", "step": 1, "tokens": 1, "flops": 1, "loss": 1.0, **SPEED}
    whole = "".join(json.dumps(record | {"step": step}) + "\n" for step in range(1, 4))

    def damaged(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(f"{whole}{name}\n")
        return folder

    with failing_disk(tmp_path) as disk:
        MetricsWriter(damaged("counted"), 3).close()
    assert disk.writes > 10
    for at in range(1, disk.writes + 1):
        folder = damaged(str(at))
        with suppress(OSError), failing_disk(folder, at, errno.ENOSPC, lasting=True):
            MetricsWriter(folder, 3).close()
        assert (folder / "metrics.jsonl").read_text().startswith(whole)
        MetricsWriter(folder, 3).close()
        assert (folder / "metrics.jsonl").read_text() == whole
        (copy,) = folder.glob("metrics.damaged*")
        assert copy.name == "metrics.damaged.jsonl" and copy.read_text() == f"{whole}{at}\n"
    again = folder / "metrics.jsonl"
    again.write_text(f"{whole}again\n")
    MetricsWriter(folder, 3).close()
    assert (folder / "metrics.damaged-2.jsonl").read_text() == f"{whole}again\n"
    assert copy.read_text() == f"{whole}{at}\n"
