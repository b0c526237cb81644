"""What users get wrong: one line on stderr, exit status 2, nothing on stdout."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from yoco_u.checksums import SUMS


def test_unknown_key_names_the_nearest(run: Any, workspace: Path) -> None:
    error = run("train", workspace / "config.yaml", "training.stepz=3").error
    assert "training.stepz" in error
    assert "did you mean steps" in error
    error = run("train", workspace / "config.yaml", "learning_rate=1").error
    assert "unknown key learning_rate: did you mean optimizer.learning_rate?" in error


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["training.steps=0"], "training.steps"),
        (["training.steps=many"], "'many'"),
        (["training.steps"], "key=value"),
        (["optimizer.schedule=linear"], "optimizer.schedule"),
        (["architecture.preset=yoco_x"], "unknown preset 'yoco_x'"),
        (["architecture.size=9b"], "unknown size '9b'"),
        (["architecture.loops=0"], "loops"),
        (["architecture.loops=1000000000"], "1000000000 loops are too many"),
        (["architecture.window=0"], "window"),
        (["architecture.vocab_size=260"], "vocab_size"),
        (["training.device=abacus"], "abacus"),
        (["data.vocab_size=1000000000"], "less than or equal to 1000000"),  # whose trainer would take 70 GB before any text
    ],
)
def test_wrong_settings(run: Any, workspace: Path, tmp_path: Path, overrides: list[str], part: str) -> None:
    assert part in run("train", workspace / "config.yaml", *overrides, "--out", tmp_path / "run", "--json").error


def test_missing_and_broken_configs(run: Any, tmp_path: Path) -> None:
    assert "packaged are" in run("train", tmp_path / "none.yaml").error
    assert "did you mean" in run("train", "1.3bb").error
    assert "did you mean 8m?" in run("train", "8M").error
    (tmp_path / "grid" / "a").mkdir(parents=True)
    (tmp_path / "grid" / "a" / "config.yaml").touch()
    assert "is a run, and no config" in run("train", tmp_path / "grid" / "a").error
    assert "holds several runs; give one of them: a" in run("generate", tmp_path / "grid", "--prompt", "x").error
    (tmp_path / "broken.yaml").write_text("name: [1, 2")
    assert "not valid YAML" in run("train", tmp_path / "broken.yaml").error
    (tmp_path / "list.yaml").write_text("- 1")
    assert "mapping" in run("prepare", tmp_path / "list.yaml").error
    (tmp_path / "models.yaml").write_text("title: x\nbase: {}\nmodels: {}\nsamples: {prompts: []}")
    assert "models" in run("quickstart", "--config", tmp_path / "models.yaml").error


def test_prepare(run: Any, tmp_path: Path) -> None:
    assert "--corpus" in run("prepare", "--corpus", "x").error
    assert "nothing there" in run("prepare", "--corpus", tmp_path / "nothing there", "--out", tmp_path / "data", "--json").error
    error = run("prepare", "--corpus", "stdlib", "--out", tmp_path / "data", "data.vocab=300").error
    assert "did you mean vocab_size" in error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "--context", "-5"], "--context: Input should be greater than 0, got -5"),
        (["plan", "--batch", "0"], "--batch: "),
        (["plan", "--kv-dtype", "fp16"], "--kv-dtype: "),
        (["needles", "model", "--digits", "1"], "--digits: "),
        (["chat", "model", "--temperature", "-1"], "--temperature: "),
        (["bench", "--rounds", "0"], "--rounds"),
    ],
)
def test_the_wrong_option_is_named(run: Any, workspace: Path, arguments: list[str], part: str) -> None:
    assert part in run(*(workspace / "a" if one == "model" else one for one in arguments)).error


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "none"], ["tasks", "none", "x"], ["context", "none"], ["needles", "none"], ["chat", "none"],
        ["generate", "none", "--prompt", "x"], ["serve", "none"], ["analyze", "none"], ["exits", "none"], ["sft", "none", "x"],
        ["grpo", "none", "x"], ["train", "none"], ["prepare", "none"], ["experiment", "none"],
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_before_torch_is_loaded(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "yoco_u.training",
        "yoco_u.experiment.config",
        "yoco_u.inference",
        "yoco_u.evaluation.held_out",
        "yoco_u.data",
    ):
        monkeypatch.setitem(sys.modules, name, None)  # which makes its import fail
    assert "none" in run(*arguments).error


def test_usage(run: Any, workspace: Path) -> None:
    assert "No such command" in run("trian").error
    assert "--temperature" in run("generate", workspace / "a", "--prompt", "a", "--temprature", "1").error
    assert "--prompt" in run("generate", workspace / "a").error
    wrong = run("generate", workspace / "a", "--prompt", "a", "--max-tokens", "x").error
    assert "--max-tokens" in wrong and "'x'" in wrong
    assert "'auto'" in run("evaluate", workspace / "a", "--num-loops", "auto").error


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "--prompt", "a")])
def test_no_model_there(run: Any, workspace: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    assert "no such folder" in run(name, tmp_path / "none", *options).error
    assert "neither a run folder" in run(name, workspace / "corpus", *options).error
    (tmp_path / "unfinished").mkdir()
    shutil.copy(workspace / "a" / "config.yaml", tmp_path / "unfinished")
    assert "not finished" in run(name, tmp_path / "unfinished", *options).error


def test_links_that_lead_in_a_circle(run: Any, workspace: Path, tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    assert "circle" in run("serve", circle).error
    shutil.copytree(workspace / "a", tmp_path / "run")
    line = ("train", tmp_path / "run" / "config.yaml", f"dataset={circle}", "data=null", "--out", tmp_path / "run")
    assert "data" in run(*line).error


def damaged(workspace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workspace / "a" / "model", tmp_path / "model")
    return tmp_path / "model"


def test_damaged_weights(run: Any, workspace: Path, tmp_path: Path) -> None:
    model = damaged(workspace, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{weights}: the file is damaged, its checksum" in run("generate", model, "--prompt", "a").error
    (model / SUMS).unlink()
    assert "cannot load the model" in run("generate", model, "--prompt", "a").error
    weights.unlink()
    assert "cannot load the model" in run("generate", model, "--prompt", "a").error


def test_damaged_config_and_tokenizer(run: Any, workspace: Path, tmp_path: Path) -> None:
    model = damaged(workspace, tmp_path)
    (model / "tokenizer.json").write_text("{}")
    assert f"{model / 'tokenizer.json'}: the file is damaged, its checksum" in run("generate", model, "--prompt", "a").error
    (model / SUMS).unlink()
    assert "tokenizer" in run("generate", model, "--prompt", "a").error
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in run("generate", model, "--prompt", "a").error
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert "num_attention_heads 3" in run("generate", model, "--prompt", "a").error
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama'" in run("generate", model, "--prompt", "a").error
    (model / "config.json").write_text("{")
    assert "damaged" in run("generate", model, "--prompt", "a").error
    (model / "config.json").write_text(json.dumps(config))
    for text in ("", "{", "[]", (model / "generation_config.json").read_text()[:-9]):
        (model / "generation_config.json").write_text(text)
        assert f"{model / 'generation_config.json'}: " in run("generate", model, "--prompt", "a").error
    (model / "generation_config.json").unlink()
    index = model / "model.safetensors.index.json"
    (model / "model.safetensors").unlink()
    for weight_map, said in (({"a": "../a"}, "names '../a', which is no file of the folder"), ([], "a valid dictionary")):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert f"{index}: " in (error := run("generate", model, "--prompt", "a").error) and said in error


@pytest.mark.parametrize(
    ("edited", "part"),
    [
        ({"window": "8"}, "Field 'window'"),
        ({"vocab_size": 301}, "has shape (300, 32), but config.json says (301, 32)"),
        ({"intermediate_size": 10**9}, "but config.json says"),
        ({"qk_norm": True}, "the weights lack model.global_kv.k_norm.weight"),
        ({"stages": [{"attention": "sliding", "layers": 2}, {"attention": "cross", "layers": 1}]}, "stages.1.layers.1"),
        ({"tie_word_embeddings": True}, "ties the LM head to the embedding, but it is another"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "no key 'rope_parameters'"),
        ({"num_hidden_layers": 2}, "set the layers of stages"),
    ],
    ids=str,
)
def test_configs_that_their_weights_do_not_fit(
    run: Any, workspace: Path, tmp_path: Path, edited: dict[str, Any], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, without the table that transformers writes, and without initialising or leaving out anything."""
    model = damaged(workspace, tmp_path)
    (model / SUMS).unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | edited))
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        assert part in run("generate", model, "--prompt", "a").error
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (("--num-loops", "0"), "--num-loops is '0'; expected a whole number of at least 1, or auto"),
        (("--num-loops", "most"), "or auto"),
        (("--num-loops", "auto"), "no exits.json"),
        (("--num-loops", "2", "--exit-threshold", "0.1"), "exit_threshold is for num_loops auto, but num_loops is 2"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_generate_options(run: Any, workspace: Path, option: tuple[str, str], part: str) -> None:
    assert part in run("generate", workspace / "a", "--prompt", "a", *option).error


@pytest.mark.parametrize("more", [(), ("-n", "2"), ("--json",)])
def test_a_grammar_that_is_none_prints_nothing(run: Any, workspace: Path, more: tuple[str, ...]) -> None:
    assert "unclosed" in run("generate", workspace / "a", "--prompt", "a", "--regex", "[", *more).error


def test_empty_prompt(run: Any, workspace: Path) -> None:
    assert "prompt is empty" in run("generate", workspace / "a", "--prompt", "").error


def test_int8_weights_without_torchao(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "pip install 'yoco-u[quantization]'" in run("evaluate", workspace / "a", "--weights", "int8").error


def test_evaluate(run: Any, workspace: Path, tmp_path: Path) -> None:
    assert "--num-loops is 0" in run("evaluate", workspace / "a", "--num-loops", "0").error
    assert "--weights" in run("evaluate", workspace / "a", "--weights", "int3").error
    assert "none.txt" in run("evaluate", workspace / "a", tmp_path / "none.txt").error
    assert "name files" in run("evaluate", workspace / "a" / "model").error
    (tmp_path / "empty.txt").touch()
    assert "no text" in run("evaluate", workspace / "a", tmp_path / "empty.txt").error
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    assert "bad.jsonl:2" in run("evaluate", workspace / "a", tmp_path / "bad.jsonl").error


@pytest.mark.parametrize(
    "line",
    [
        ("needles", "RUN", "--lengths", "512,512"),
        ("bench", "--contexts", "64,64"),
        ("train", "CONFIG", "training.evaluate_loops=[2,2]"),
    ],
    ids=" ".join,
)
def test_values_that_are_there_twice(run: Any, workspace: Path, line: tuple[str, ...]) -> None:
    """They would be measured twice, and the tables show one of them, or both in columns of others."""
    places = {"RUN": workspace / "a", "CONFIG": workspace / "config.yaml"}
    assert "expected each value once" in run(*(places.get(part, part) for part in line)).error


def test_tasks_have_a_command_of_their_own(run: Any, workspace: Path) -> None:
    assert "run yoco-u tasks RUN_OR_MODEL TASKS" in run("evaluate", workspace / "a", "--tasks", "piqa", "--limit", 3).error
    assert "run yoco-u tasks RUN_OR_MODEL TASKS" in run("evaluate", workspace / "a", "--limit", 3, "--tasks=piqa").error
    assert "--num-loops" in run("tasks", workspace / "a", "piqa", "--num-loops", 0).error
    assert "--weights" in run("tasks", workspace / "a", "piqa", "--weights", "int4").error


def test_report(run: Any, workspace: Path, tmp_path: Path) -> None:
    assert "no run here" in run("report", tmp_path).error
    shutil.copytree(workspace / "a", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{\n{}\n")
    assert "metrics.jsonl" in run("report", tmp_path / "run").error
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "lacks steps 1 to 5" in run("report", tmp_path / "run").error
    (tmp_path / "run" / "summary.json").unlink()
    assert "no metrics yet" in run("report", tmp_path / "run").error
    error = run("report", workspace / "a", "--out", workspace / "config.yaml" / "report.html").error
    assert f"{workspace / 'config.yaml'} is a file; name a folder" in error


def test_weights_that_are_not_finite(run: Any, workspace: Path, tmp_path: Path) -> None:
    """Every command that scores names the weight; none writes NaN, which JSON does not have."""
    model = damaged(workspace, tmp_path)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("down_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / SUMS).unlink()
    text = workspace / "corpus" / "00.py"
    grid = ["--kinds", "single_1", "--lengths", 512, "--samples", 1, "--depths", 1]
    for line in (
        ["evaluate", model, text, "--json"],
        ["context", model, "--files", text, "--prefixes", 8, "--last", 8, "--json", tmp_path / "a.json"],
        ["needles", model, *grid, "--json", tmp_path / "b.json"],
        ["analyze", model, text, "--measures", "angular", "--out", tmp_path / "c"],
        ["tasks", model, "yoco_u_stdlib_perplexity", "--limit", 1, "--json"],
        ["generate", model, "--prompt", "a", "--max-tokens", 1, "-n", 2, "--greedy"],
    ):
        outcome = run(*line)
        assert outcome.status == 2 and "NaN or infinity" in outcome.err.splitlines()[-1], (line, outcome)
        assert name in outcome.err or line[0] in ("needles", "tasks", "generate")
        assert outcome.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(("tokens", "part"), [(0, "max_batched_tokens"), (8, "raise max_batched_tokens to 16")])
def test_steps_that_are_too_small(run: Any, workspace: Path, tokens: int, part: str) -> None:
    assert part in run("serve", workspace / "a", "--max-batched-tokens", tokens).error


def test_a_model_that_cannot_fit(run: Any, workspace: Path, tmp_path: Path) -> None:
    size = ["architecture.hidden_size=2000000", "architecture.intermediate_size=8000000"]
    assert "weights, gradients and optimizer" in run("train", workspace / "config.yaml", *size, "--out", tmp_path / "run").error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("too_much", ["training.micro_batch_rows=1000000000", "training.sequence_length=1000000000"])
def test_a_batch_that_cannot_fit(run: Any, workspace: Path, tmp_path: Path, too_much: str) -> None:
    batch = ["training.batch_rows=1000000000"] if "rows" in too_much else []
    assert "keeps at least" in run("train", workspace / "config.yaml", too_much, *batch, "--out", tmp_path / "run").error
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(run: Any, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine", encoding="utf-8")
    error = run("train", workspace / "config.yaml", f"dataset={tmp_path / 'mine'}", "--out", tmp_path / "run").error
    assert "is no prepared dataset" in error and "remove" not in error
    run("train", workspace / "config.yaml", "training.sequence_length=60000", "--out", tmp_path / "run")
    (tmp_path / "mine" / "empty").mkdir()
    for out in ("new/runs/a", "new/b", "mine/c", "mine/empty/d/e"):
        for what in ("architecture.loops=1000000000", "training.sequence_length=60000", f"dataset={tmp_path / 'nowhere'}"):
            assert run("train", workspace / "config.yaml", what, "data=null", "--out", tmp_path / out).error
    (tmp_path / "mine" / "empty").rmdir()
    assert "too long" in run("train", workspace / "config.yaml", f"dataset={'a' * 260}", "--out", tmp_path / "new" / "d").error
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("what", ["wandb", "start", "teacher", "late"])
def test_what_can_be_known_is_told_before_the_dataset_is_prepared(
    what: str, run: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what turns up later, such as an empty corpus, leaves no folder either."""
    model = damaged(workspace, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings, part = {
        "wandb": ("training.wandb_project=a", "wandb is not installed"),
        "start": (f"start_from={model}", "the file is damaged"),
        "teacher": (f"distillation={{teacher: {model}}}", "the file is damaged"),
        "late": ("architecture.vocab_size=280", "the tokenizer has 300 tokens"),
    }[what]
    dataset = tmp_path / "dataset"
    where = [f"dataset={workspace / 'data'}", "data=null"] if what == "late" else [f"dataset={dataset}"]
    line = ("train", workspace / "config.yaml", settings, *where, "--out", tmp_path / "new" / "run")
    assert part in run(*line).error
    assert not (tmp_path / "new").exists() and not dataset.exists()
