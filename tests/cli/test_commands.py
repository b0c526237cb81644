"""Every command end to end on tiny inputs."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import yoco_u.cli
from yoco_u.budget import training_flops
from yoco_u.cli.settings import PACKAGED, load_run_config, packaged_configs
from yoco_u.training import TrainingInterrupted, read_metrics
from yoco_u.training.run_folder import read_run


def test_prepare_prints_what_it_made(run: Any, workspace: Path, tmp_path: Path) -> None:
    options = (
        "--corpus",
        workspace / "corpus",
        "--out",
        tmp_path / "data",
        "data.vocab_size=280",
        "data.validation_fraction=0.3",
    )
    index = run("prepare", *options, "--json").json
    assert index["vocab_size"] <= 280
    assert index["config"]["corpus"] == [str(workspace / "corpus")]
    again = run("prepare", *options)
    assert again.status == 0
    assert again.out.startswith("train: ")
    assert f"vocabulary {index['vocab_size']}" in again.out


def test_train_leaves_a_run_folder_that_explains_itself(workspace: Path) -> None:
    folder = workspace / "a"
    assert {"config.yaml", "environment.json", "metrics.jsonl", "model"} <= {path.name for path in folder.iterdir()}
    records = read_run(folder)
    assert records.config == load_run_config(str(workspace / "config.yaml"), [])
    assert [record["step"] for record in records.kind("train")] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records.kind("evaluation")] == [2, 4, 5]


def test_train_json_is_the_summary_and_a_finished_run_is_left_alone(run: Any, workspace: Path) -> None:
    before = (workspace / "a" / "metrics.jsonl").read_bytes()
    summary = run("train", workspace / "config.yaml", "--out", workspace / "a", "--json").json
    assert summary["steps"] == 5
    assert (workspace / "a" / "metrics.jsonl").read_bytes() == before


def direct_loss(model_folder: Path, texts: list[str], num_loops: int | None = None) -> tuple[float, int]:
    """Sum of nats and number of predictions, document by document, with plain transformers calls."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    end = tokenizer.eos_token_id
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[end, *tokenizer(text, add_special_tokens=False).input_ids, end]])
        with torch.no_grad():
            logits = model(ids[:, :-1], num_loops=num_loops).logits
        total -= logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total, count


@pytest.mark.parametrize("num_loops", [None, 1, 4])
def test_evaluate_against_a_direct_computation(run: Any, workspace: Path, tmp_path: Path, num_loops: int | None) -> None:
    texts = ["def täglich():\n    return 1\n", "x = 2\n", "class A:\n    pass\n" * 5]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[1:]))
    (tmp_path / "one.txt").write_text(texts[0], encoding="utf-8")
    loops = () if num_loops is None else ("--num-loops", num_loops)
    files = (tmp_path / "one.txt", tmp_path / "held.jsonl", "--text-field", "body", "--sequence-length", 400)
    [result] = run("evaluate", workspace / "a", *files, *loops, "--json").json["results"]
    nats, count = direct_loss(workspace / "a" / "model", texts, num_loops)
    bytes_ = sum(len(text.encode()) for text in texts)
    assert result["num_loops"] == (num_loops or 2)
    assert (result["tokens"], result["bytes"], result["documents"]) == (count, bytes_, 3)
    assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_, rel=1e-5)


def test_evaluate_counts_every_token_once_whatever_the_row_length(run: Any, workspace: Path) -> None:
    file = workspace / "corpus" / "03.py"
    results = [
        run("evaluate", workspace / "a", file, "--sequence-length", n, "--json").json["results"][0] for n in (1, 7, 32, 4096)
    ]
    assert len({(r["tokens"], r["bytes"]) for r in results}) == 1
    assert results[0]["bytes"] == file.stat().st_size
    unigrams, full = results[0]["loss"], results[-1]["loss"]
    assert unigrams != full


def test_evaluate_of_a_run_is_its_own_last_evaluation(run: Any, workspace: Path) -> None:
    [result] = run("evaluate", workspace / "a", "--json").json["results"]
    last = [record for record in read_metrics(workspace / "a") if record["kind"] == "evaluation"][-1]
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)


def test_evaluate_prints_a_table_of_loop_counts(run: Any, workspace: Path) -> None:
    outcome = run("evaluate", workspace / "a", workspace / "corpus" / "03.py", "--num-loops", 1, "--num-loops", 3)
    lines = [line.split() for line in outcome.out.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert [line[0] for line in lines] == ["1", "3"]


def quantized_loss(model_folder: Path, file: Path, num_loops: int) -> float:
    """By plain transformers calls, with weights rounded to 255 steps of each output by the direct formula."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            step = layer.weight.detach().abs().amax(1, keepdim=True) / 127.5
            layer.weight = torch.nn.Parameter((layer.weight * (1 / step)).round().clamp(-128, 127) * step)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = [tokenizer.eos_token_id, *tokenizer(file.read_text(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    row = torch.tensor([ids])
    with torch.no_grad():
        return model(row[:, :-1], shift_labels=row[:, 1:], num_loops=num_loops).loss.item()


def test_evaluate_reports_what_int8_weights_change_at_each_loop_count(run: Any, workspace: Path) -> None:
    file = workspace / "corpus" / "03.py"
    options = (workspace / "a", file, "--num-loops", 1, "--num-loops", 3, "--sequence-length", 4096)
    plain = run("evaluate", *options, "--json").json["results"]
    both = run("evaluate", *options, "--weights", "int8", "--json").json["results"]
    changes = [row.pop("quantized") for row in both]
    for before, row, quantized in zip(plain, both, changes, strict=True):
        assert row == before
        assert quantized["loss"] == pytest.approx(quantized_loss(workspace / "a" / "model", file, row["num_loops"]), rel=1e-6)
        assert quantized["loss"] != before["loss"]
        assert quantized["perplexity"] == pytest.approx(math.exp(quantized["loss"]), rel=1e-6)
        for figure in ("loss", "perplexity"):
            assert quantized[f"{figure}_change"] == quantized[figure] - before[figure]
    table = run("evaluate", *options, "--weights", "int8")
    lines = [line.split() for line in table.out.splitlines() if line.strip() and line.split()[0].isdigit()]
    for line, row, quantized in zip(lines, plain, changes, strict=True):
        assert line[:4] == [
            str(row["num_loops"]),
            f"{row['loss']:.4f}",
            f"{quantized['loss']:.4f}",
            f"{quantized['loss_change']:+.5f}",
        ]


def test_generate_streams_what_json_tells(run: Any, workspace: Path) -> None:
    options = ("--prompt", "def ", "--max-tokens", 12, "--seed", 3, "--top-k", 5, "--top-p", 0.9)
    streamed = run("generate", workspace / "a", *options)
    told = output(run("generate", workspace / "a" / "model", *options, "--json"))
    assert streamed.status == 0
    assert streamed.out == "def " + told["text"] + "\n"
    assert told["tokens"] <= 12
    assert told["text"] != output(run("generate", workspace / "a", *options, "--seed", 4, "--json"))["text"]


def output(outcome: Any) -> Any:
    [request] = outcome.json["requests"]
    [found] = request["outputs"]
    return found


def test_generate_several_texts_of_several_prompts(run: Any, workspace: Path) -> None:
    options = ("--prompt", "def ", "--prompt", "x", "-n", 2, "--max-tokens", 6, "--stop", "\n", "--dtype", "float32")
    told = run("generate", workspace / "a", *options, "--json").json
    assert [request["prompt"] for request in told["requests"]] == ["def ", "x"]
    assert [len(request["outputs"]) for request in told["requests"]] == [2, 2]
    shown = run("generate", workspace / "a", *options).out
    texts = [request["prompt"] + found["text"] for request in told["requests"] for found in request["outputs"]]
    assert shown == "".join(f"{text}\n{'-' * 40}\n" for text in texts)


def test_generate_what_fits_a_grammar(run: Any, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
    told = output(run("generate", workspace / "a", "--prompt", "x", "--json-schema", tmp_path / "schema.json", "--json"))
    assert told["text"] in ('"yes"', '"no"')
    assert output(run("generate", workspace / "a", "--prompt", "x", "--regex", "[ab]{3}", "--json"))["text"].strip("ab") == ""


def test_generate_greedily_takes_the_likeliest_tokens(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("return x"))
    told = run(
        "generate",
        workspace / "a",
        "--prompt",
        "-",
        "--greedy",
        "--max-tokens",
        5,
        "--num-loops",
        3,
        "--dtype",
        "float32",
        "--json",
    )
    model = AutoModelForCausalLM.from_pretrained(workspace / "a" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(workspace / "a" / "model")
    ids = [tokenizer.eos_token_id, *tokenizer("return x", add_special_tokens=False).input_ids]
    written: list[int] = []
    while len(written) < 5 and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written]), num_loops=3).logits[0, -1].argmax()))
    assert told.json["requests"][0]["prompt"] == "return x"
    assert output(told)["text"] == tokenizer.decode(written, skip_special_tokens=True)


def test_report_of_one_and_of_two_runs(run: Any, workspace: Path, tmp_path: Path) -> None:
    one = run("report", workspace / "a", "--out", tmp_path / "one.html")
    assert one.out == f"report: {tmp_path}/one.html\n"
    assert (tmp_path / "one.html").stat().st_size > 10_000
    two = run("report", workspace / "a", workspace / "b", "--out", tmp_path / "two.html", "--json").json
    assert [figures["name"] for figures in two["runs"]] == ["tiny", "twin"]
    [gap] = two["gaps"]
    assert (gap["run"], gap["other"], gap["equal"]) == ("tiny", "twin", "steps")


QUICKSTART = """\
title: Small
base:
  data: {{corpus: {folder}/corpus, vocab_size: 300, validation_fraction: 0.3}}
  optimizer: {{warmup_steps: 2}}
  training:
    steps: 4
    sequence_length: 32
    batch_rows: 4
    micro_batch_rows: 4
    compile: "off"
models:
  short: {{label: Short, settings: &plain {{architecture: {{preset: yoco, size: test, vocab_size: 300}}}}}}
  long: {{label: Long, match: {{by: flops, reference: looped}}, settings: *plain}}
  looped:
    label: Looped
    settings: {{architecture: {{preset: yoco_u, size: test, vocab_size: 300, loops: 4}}}}
samples: {{prompts: ["def ", "x"], sampling: {{max_tokens: 5, seed: 0}}}}
"""


def test_quickstart_compares_at_equal_steps_and_equal_flops(run: Any, workspace: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "quickstart.yaml", tmp_path / "out"
    config.write_text(QUICKSTART.format(folder=workspace))
    figures = run("quickstart", "--config", config, "--out", out, "training.steps=6", "--json").json
    steps = {figure["name"]: figure["steps"] for figure in figures["runs"]}
    looped, plain = (read_run(out / name).config.architecture for name in ("looped", "short"))
    assert steps == {"Short": 6, "Long": round(6 * training_flops(looped, 32) / training_flops(plain, 32)), "Looped": 6}
    assert "At equal steps" in figures["headline"]
    samples = json.loads((out / "looped" / "samples.json").read_text())
    assert [sample["prompt"] for sample in samples] == ["def ", "x"]
    assert "<h1>Small</h1>" in (out / "report.html").read_text()

    (out / "looped" / "summary.json").unlink()
    assert "3 runs of " in run("quickstart", "--config", config, "--out", out, "training.steps=6").err
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("metrics.jsonl", "samples.json")}
    again = run("quickstart", "--config", config, "--out", out, "training.steps=6")
    assert again.status == 0 and "tokens in all" not in again.err
    assert figures["headline"].split()[0] in again.out
    assert str(out / "report.html") in again.out.replace("\n", "")
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert "training.steps" in run("quickstart", "--config", config, "--out", out, "training.steps=7", "--json").error


def test_packaged_configs_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run has been called like one."""
    monkeypatch.chdir(tmp_path)
    assert packaged_configs()
    for name in packaged_configs():
        Path(name).mkdir()
        Path(name, "config.yaml").touch()
        config = load_run_config(name, [])
        assert config.data is not None
        assert config.data.vocab_size <= config.architecture.vocab_size


def test_the_packaged_quickstart_spends_equal_flops() -> None:
    from yoco_u.config import load_yaml, parse
    from yoco_u.experiment.config import Experiment
    from yoco_u.experiment.grid import expand

    experiment = parse(Experiment, load_yaml(PACKAGED / "quickstart.yaml"), "quickstart")
    configs = {cell.name: cell.config for cell in expand(experiment, Path("anywhere"))}

    def spent(name: str) -> float:
        training = configs[name].training
        tokens = training.steps * training.batch_rows * training.sequence_length
        return tokens * training_flops(configs[name].architecture, training.sequence_length)

    assert all(c.data and c.data.vocab_size <= c.architecture.vocab_size for c in configs.values())
    assert configs["yoco"].training.steps == configs["yoco-u"].training.steps
    assert spent("yoco-equal-flops") == pytest.approx(spent("yoco-u"), rel=2e-3)
    assert configs["yoco-u"].architecture.with_loops(1).stages[1:] == configs["yoco"].architecture.stages[1:]


@pytest.mark.parametrize(
    "command", ["quickstart", "prepare", "train", "evaluate", "tasks", "generate", "report", "analyze", "experiment", "bench"]
)
def test_help_has_examples(run: Any, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.status == 0
    assert f"yoco-u {command} " in outcome.out
    assert "Examples" in outcome.out


def test_help_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "yoco_u.cli", "--help"], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("ends", [KeyboardInterrupt(), TrainingInterrupted("stopped after step 3")])
def test_an_interrupted_command_ends_with_one_line_and_130(
    run: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: BaseException
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ends

    monkeypatch.setattr("yoco_u.training.train", stop)
    outcome = run("train", workspace / "config.yaml", "--out", tmp_path / "run")
    assert outcome.status == 130
    assert len(outcome.err.strip().splitlines()) == 1


def test_main_takes_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["yoco-u", "report", "--help"])
    assert yoco_u.cli.main() == 0
    assert "yoco-u report" in capsys.readouterr().out
