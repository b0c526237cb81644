"""`yoco-u plan`: its figures against the paper, the model and the engine's caches; its files; its one-line errors."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from yoco_u import Architecture, YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import SIZES, STAGES, preset
from yoco_u.budget import KVType, decode_flops, forward_flops, optimizer_bytes, parameters, prefill_flops, training_flops
from yoco_u.cli import main
from yoco_u.config import dump_yaml
from yoco_u.inference.kv_cache import CacheShape, KVCache
from yoco_u.paper import KV_MEBIBYTES
from yoco_u.planning import this_machine
from yoco_u.planning.candidates import find_architecture
from yoco_u.planning.hardware import Hardware

META = torch.device("meta")


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command and reads its JSON, figures by context."""

    def call(*arguments: object) -> dict[str, Any]:
        file = tmp_path / "plan.json"
        assert main(["plan", *map(str, arguments), "--json", str(file)]) == 0, capsys.readouterr().err
        found = json.loads(file.read_text())
        for column in found["architectures"]:
            column["figures"] = {figures["context"]: figures for figures in column["figures"]}
        return found

    return call


def by_name(found: dict[str, Any]) -> dict[str, Any]:
    return {column["name"]: column for column in found["architectures"]}


def test_every_kv_figure_of_the_paper(plan: Any) -> None:
    names = {name for figures in KV_MEBIBYTES.values() for name in figures}
    found = by_name(plan(*names, "--size", "1.3b", "--context", ",".join(map(str, KV_MEBIBYTES))))
    for context, figures in KV_MEBIBYTES.items():
        for name, mebibytes in figures.items():
            assert found[name]["figures"][int(context)]["kv_bytes_per_sequence"] == mebibytes * 2**20
            assert found[name]["figures"][int(context)]["kv_bytes"] == 32 * mebibytes * 2**20


RECURSIVE = ("universal_transformer", "rins", "yoco_u")


def test_recursive_variants_spend_about_twice_the_transformers_flops(plan: Any) -> None:
    """The weights of the blocks, which is what loops repeat, cost 1.97 to 2 times as many FLOPs as the Transformer's.

    A context of 1 and a vocabulary of 1 leave these FLOPs alone. With the LM head, which does not loop, it is 1.79 to 1.81
    times at context 512. At the paper's length of 8192 attention counts as well, which the window makes cheaper for YOCO-U:
    1.85, 1.85 and 1.52 times.
    """
    assert preset("universal_transformer", "1.3b").stages[0].loops == 2
    blocks = plan("transformer", *(f"{name}:vocab_size=1" for name in RECURSIVE), "transformer:vocab_size=1", "--context", "1")
    base = by_name(blocks)["transformer:vocab_size=1"]["figures"][1]["training_flops_per_token"]
    for name in RECURSIVE:
        ratio = by_name(blocks)[f"{name}:vocab_size=1"]["figures"][1]["training_flops_per_token"] / base
        assert 1.97 < ratio < 2.001
    whole = by_name(plan("transformer", *RECURSIVE, "--context", "512,8192"))
    for name in RECURSIVE:
        ratios = {context: whole[name]["figures"][context]["ratios"]["training_flops_per_token"] for context in (512, 8192)}
        assert 1.78 < ratios[512] < 1.82
        assert 1.5 < ratios[8192] < 1.9


@pytest.mark.parametrize(("size", "kind"), zip(SIZES, itertools.cycle(["bfloat16", "float32", "int8"])))
def test_bytes_are_those_of_the_model_and_of_the_engines_caches(plan: Any, size: str, kind: KVType) -> None:
    batch, context, block = 3, 1024, 256
    dtype = "float32" if kind == "float32" else "bfloat16"
    options = ("--size", size, "--context", context, "--batch", batch, "--kv-dtype", kind, "--dtype", dtype)
    for name, column in by_name(plan(*STAGES, *options)).items():
        a = preset(name, size)
        assert column["architecture"] == a.model_dump(mode="json")
        with META:
            model = YocoUForCausalLM(YocoUConfig.from_architecture(a)).to(getattr(torch, dtype))
        assert column["weight_bytes"] == sum(p.nbytes for p in model.parameters())
        window = min(a.window, context) if a.window else None
        cache = KVCache(a, CacheShape(batch * context // block, block, batch, window, kind), META)
        cache.grow(max(stage.loops for stage in a.stages))
        assert (
            column["figures"][context]["kv_bytes"]
            == cache.nbytes
            == batch * column["figures"][context]["kv_bytes_per_sequence"]
        )


def test_flops_and_counts_are_those_of_the_budget(plan: Any) -> None:
    """test_budget.py compares the budget's figures with torch's counter, the model and the optimizer."""
    found = by_name(plan("yoco_u", "rins", "yoco_u:size=10b-moe", "--context", "100,3000"))
    for name, a in {"rins": preset("rins", "1.3b"), "yoco_u:size=10b-moe": preset("yoco_u", "10b-moe")}.items():
        column, counts = found[name], parameters(a)
        assert column["parameters"] == counts.total
        assert column["active_parameters"] == counts.active
        assert column["embedding_parameters"] == counts.embedding
        assert column["training_state_bytes"] == optimizer_bytes(a)
        for context, figures in column["figures"].items():
            assert figures["training_flops_per_token"] == training_flops(a, context) == 3 * forward_flops(a, context)
            assert figures["prefill_flops_per_token"] == prefill_flops(a, context) / context
            assert figures["decode_flops_per_token"] == decode_flops(a, context)


def test_what_fits(plan: Any) -> None:
    line = "memory=8GiB,gemm=1e12,bandwidth=1e11"
    options = ("--hardware", line, "--batch", 4, "--size", "100m", "--context", "4096,1048576")
    found = by_name(plan("yoco_u", "transformer", *options))
    for column in found.values():
        for figures in column["figures"].values():
            room = 8 * 2**30 - column["weight_bytes"]
            assert figures["fits"] == (figures["kv_bytes"] <= room) == (figures["largest_batch"] >= 4)
            assert figures["largest_batch"] * figures["kv_bytes_per_sequence"] <= room
            assert (column["largest_context"] >= figures["context"]) == figures["fits"]
    assert not found["transformer"]["figures"][1048576]["fits"]
    assert found["yoco_u"]["figures"][1048576]["fits"]


def test_ratios_are_of_the_transformer_or_else_of_the_first(plan: Any) -> None:
    found = plan("yoco_u", "transformer", "--context", "8192")
    assert found["reference"] == "transformer"
    yoco_u, transformer = (column["figures"][8192] for column in found["architectures"])
    for name, ratio in yoco_u["ratios"].items():
        assert ratio == pytest.approx(yoco_u[name] / transformer[name])
    assert set(transformer["ratios"].values()) == {1}
    assert plan("yoco_u", "yoco", "--context", "8192")["reference"] == "yoco_u"


def test_architectures_by_path(plan: Any, tmp_path: Path) -> None:
    a = preset("yoco_u", "test", loops=2, qk_norm=True)
    dump_yaml(a, tmp_path / "stages.yaml")
    (tmp_path / "config.yaml").write_text("name: x\narchitecture: {preset: yoco_u, size: test, loops: 2, qk_norm: true}\n")
    (tmp_path / "preset.yaml").write_text("{preset: yoco_u, size: test, loops: 2, qk_norm: true}\n")
    torch.manual_seed(0)
    YocoUForCausalLM(YocoUConfig.from_architecture(a)).save_pretrained(tmp_path / "saved")
    paths = [tmp_path / "stages.yaml", tmp_path / "config.yaml", tmp_path, tmp_path / "preset.yaml", tmp_path / "saved"]
    found = by_name(plan(*paths, f"{tmp_path / 'saved'}:loops=5", "--context", "64"))
    for path in paths:
        assert Architecture(**found[str(path)]["architecture"]) == a
    assert Architecture(**found[f"{tmp_path / 'saved'}:loops=5"]["architecture"]) == a.with_loops(5)


@pytest.mark.parametrize("variant", ["stages", "experts", "retention", "parscale"])
def test_a_saved_models_file_says_all_of_its_architecture(plan: Any, tmp_path: Path, variant: str) -> None:
    a = {
        "stages": preset("yoco_u", "8m"),  # what YocoUConfig has by default
        "experts": preset("transformer", "test", experts={"intermediate_size": 16, "num_experts": 4, "experts_per_token": 2}),
        "retention": preset("yoco_retention", "test", rope_cross=True, rope_theta=5e5),
        "parscale": preset("parscale", "test", streams=3),
    }[variant]
    YocoUConfig.from_architecture(a).save_pretrained(tmp_path / "model")
    [column] = plan(tmp_path / "model", "--context", "64")["architectures"]
    assert Architecture(**column["architecture"]) == a


EXPERTS = {"intermediate_size": 16, "num_experts": 4, "experts_per_token": 2}


@pytest.mark.parametrize(
    "settings",
    [{}, {"loops": 5}, {"experts": EXPERTS}, {"loops": 2, "experts": EXPERTS, "window": 8}, {"experts": EXPERTS, "loops": 2}],
)
@pytest.mark.parametrize("between", [",", ", "])
def test_settings_of_a_preset_are_yaml(settings: dict[str, Any], between: str) -> None:
    told = [f"{key}={value}".replace("'", "") for key, value in settings.items()]
    name = ":".join(["yoco_u", *([between.join(told)] if told else [])])
    assert find_architecture(name, "test") == preset("yoco_u", "test", **settings)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_paper_s_comparison_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys)
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "NVIDIA H100",
        "context 8K",
        "context 256K",
        "yoco_u",
        "rins",
        "10,240",
        "20,480    2.00x",
        "542",
        "multiples of",
    ):
        assert part in out
    assert "exceed the memory" in out
    assert "*" not in shown(capsys, "yoco_u", "--context", "1024")


def test_decimal_points_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a number has one; where not, its last digit stands before it."""
    out = shown(capsys, "yoco_u", "transformer", "--context", "65536")
    for column in (r"[\d.,]+(?=[ *]+\d+\.\d\dx)", r"[\d.,]+(?=\*? *$)"):
        found = [found for line in out.splitlines() if line.startswith("  ") for found in re.finditer(column, line)]
        ends = {match.start() + len(match.group().partition(".")[0]) for match in found}
        assert len(ends) == 1 and len(found) > 5


def test_many_architectures_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *STAGES, "--context", "8192", "--size", "10b-moe")
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("context 8K") > 1
    assert "active of them" in out
    assert "active" not in shown(capsys, "yoco", "--context", "8192")


def test_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for contexts, hardware in (("8192,65536,262144", "h100"), ("4096", r"name=$\x$,memory=24GiB,gemm=900e9,bandwidth=46e9")):
        shown(capsys, "--context", contexts, "--hardware", hardware, "--plot", tmp_path / "plan.png")
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


def test_this_machine(plan: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(this_machine, "gemm_rate", lambda device, dtype, seconds: 2e12 if dtype == torch.bfloat16 else 1e12)
    monkeypatch.setattr(this_machine, "memory_read_rate", lambda device: 5e10)
    assert isinstance(this_machine.this_machine("float32"), Hardware)
    found = plan("yoco_u", "--size", "8m", "--context", "1024", "--hardware", "this")
    out = " ".join(capsys.readouterr().out.split())
    assert found["hardware"]["gemm_flops_per_second"] == 2e12
    assert found["hardware"]["memory_bytes"] > 2**28
    line = out.partition("--hardware ")[2].split()[0]
    again = plan("yoco_u", "--size", "8m", "--context", "1024", "--hardware", line)
    assert again["architectures"] == found["architectures"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("yoco_x",), "did you mean yoco_u?"),
        (("abacus",), "presets are transformer"),
        (("no/such/file.yaml",), "unknown architecture 'no/such/file.yaml'"),
        (("yoco_u:loop=3",), "did you mean loops?"),
        (("yoco_u:loops=0",), "loops"),
        (("yoco_u:loops=2,window=8,loops=3",), "loops is given 2 times; keep one of them"),
        (("yoco_u:loops=2,window",), "loops: Input should be a valid integer"),
        (("yoco:loops=2",), "yoco has no loop"),
        (("yoco_u:loops",), "unknown architecture 'yoco_u:loops'"),
        (("--size", "9b"), "unknown size '9b'"),
        (("--hardware", "h10"), "did you mean h100?"),
        (("--hardware", "memory=-1,gemm=1,bandwidth=1"), "memory"),
        (("--context", "0"), "--context"),
        (("--context", "8192,-1"), "--context"),
        (("--context", "many"), "--context is 'many'"),
        (("--batch", "0"), "batch"),
        (("--dtype", "int4"), "dtype"),
        (("--kv-dtype", "int4"), "--kv-dtype"),
        (("--plot", "no/such/folder/a.png"), "no such folder"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", *arguments, "--json", str(tmp_path / "plan.json")]) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_broken_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def error(path: Path) -> str:
        assert main(["plan", str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    (tmp_path / "other.yaml").write_text("a: 1\n")
    assert "no architecture in it" in error(tmp_path / "other.yaml")
    (tmp_path / "text.yaml").write_text("architecture: yoco_u\n")
    assert "expected a mapping" in error(tmp_path / "text.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "mapping" in error(tmp_path / "list.yaml")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "neither a run folder" in error(folder)
    for content, part in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"model_type": "llama"}', "'llama'"),
        ('{"model_type": "yoco_u"}', "missing"),
    ):
        (folder / "config.json").write_text(content)
        assert part in error(folder)
    YocoUConfig.from_architecture(preset("yoco_u", "test")).save_pretrained(folder)
    assert "only loops can be set" in error(Path(f"{folder}:window=4"))
    assert "num_loops is 0" in error(Path(f"{folder}:loops=0"))
