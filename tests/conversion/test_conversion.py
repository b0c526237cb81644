"""The blocks of a source in the stages of another architecture, and the keys and values of their cross-decoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPE, save, tokenizer
from examples import covering
from models import EXPERTS, architecture, build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from yoco_u.cli import main
from yoco_u.conversion import (
    METHODS,
    Calibration,
    Source,
    convert,
    read_source,
    target_architecture,
    write,
    write_back,
    write_gguf,
)
from yoco_u.conversion.convert import calibration_rows
from yoco_u.conversion.shared_kv import share
from yoco_u.conversion.target import PRESETS
from yoco_u.errors import UserError
from yoco_u.loading import load_model, saved_architecture
from yoco_u.model import YocoUForCausalLM, save_model
from yoco_u.model.remote_code import modelling_files

TEXT = Calibration(("stdlib",), tokens=600, length=100)


def ids(length: int = 60) -> torch.Tensor:
    return torch.randint(300, (1, length), generator=torch.Generator().manual_seed(3))


def source(folder: Path, family: str = "llama", **settings: Any) -> Source:
    save(folder, family, **settings)
    return read_source(str(folder))


def without_change(read: Source, layers: list[int]) -> None:
    """Let some layers add nothing, so that the layers behind them all read the same hidden states."""
    with torch.no_grad():
        for layer in layers:
            block = read.model.model.stages[0].layers[layer]
            block.attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()


def target(read: Source, **settings: Any) -> Any:
    return target_architecture(read.model.model.architecture, settings)


@pytest.mark.parametrize(("family", "method"), covering(["llama", "qwen2", "qwen3"], METHODS))
def test_keys_and_values_of_the_border_state_are_found_exactly(tmp_path: Path, family: str, method: str) -> None:
    """If the upper layers read the border state itself, each global KV of its own gives the source's logits again."""
    read = source(tmp_path, family)
    without_change(read, [2])  # so layer 3 reads what layer 2 does
    converted = convert(read, target(read, window=100, global_kvs=2), method, TEXT)
    with torch.no_grad():
        torch.testing.assert_close(converted.model(ids()).logits, read.model(ids()).logits, rtol=2e-3, atol=2e-3)
    if method != "mean":
        assert converted.explained == pytest.approx([1.0, 1.0], abs=1e-3)


def test_mean_is_the_mean_of_the_layers_own_projections(tmp_path: Path) -> None:
    read = source(tmp_path)
    many, one = (convert(read, target(read, global_kvs=count), "mean").model.model.global_kv for count in (2, 1))
    for name in ("k_proj", "v_proj"):
        expected = many.get_submodule(name).weight.view(2, -1, 32).mean(0)
        torch.testing.assert_close(one.get_submodule(name).weight, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_that_differ_by_what_they_can_take_over_share_exactly(tmp_path: Path, family: str) -> None:
    """Keys that are scaled and turned, pair by pair, and values that any matrix maps; with norms of keys, equal keys."""
    read = source(tmp_path, family)
    without_change(read, [2])
    first, second = (read.model.model.stages[0].layers[layer] for layer in (2, 3))
    kv_heads, dim = first.attn.k_proj.out_features // first.attn.head_dim, first.attn.head_dim
    drawn = torch.Generator().manual_seed(5)
    scale, turn = (torch.rand(kv_heads, dim // 2, 1, generator=drawn) * size + 0.5 for size in (1, 6))
    mix = torch.randn(kv_heads, dim, dim, generator=drawn) * dim**-0.5

    def turned(keys: torch.Tensor) -> torch.Tensor:
        left, right = keys.view(kv_heads, dim, -1).chunk(2, dim=1)
        cos, sin = scale * turn.cos(), scale * turn.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=1).reshape(keys.shape)

    with torch.no_grad():
        second.attn_norm.weight.copy_(first.attn_norm.weight)
        own, other = dict(first.attn.named_parameters()), dict(second.attn.named_parameters())
        for name in own.keys() & {"k_proj.weight", "k_bias"}:
            other[name].copy_(own[name] if family == "qwen3" else turned(own[name]))
        for name in own.keys() & {"v_proj.weight", "v_bias"}:
            other[name].copy_((mix @ own[name].view(kv_heads, dim, -1)).reshape(own[name].shape))
        if family == "qwen3":
            other["k_norm.weight"].copy_(own["k_norm.weight"])
    converted = convert(read, target(read, window=100), "fit", TEXT)
    with torch.no_grad():
        torch.testing.assert_close(converted.model(ids()).logits, read.model(ids()).logits, rtol=2e-3, atol=2e-3)
    assert converted.explained == pytest.approx([1.0, 1.0], abs=1e-3)


def test_what_is_shared_is_the_best_of_its_rank() -> None:
    """The squared error of keys and outputs is what the singular values beyond the rank add up to."""
    layers, kv_heads, dim, features = 3, 2, 4, 20
    drawn = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    weights = [random(2 * kv_heads * dim, features) for _ in range(layers)]
    x = random(500, features)
    out, strength = random(layers, kv_heads, 30, dim), random(layers, kv_heads, dim // 2).square()
    found = share(weights, x.T @ x / 500, strength, out.mT @ out, turn_keys=True)
    for head in range(kv_heads):
        pairs = [(x @ one.T, x @ found.of_layer(layer).T) for layer, one in enumerate(weights)]
        keys, values = ([[y.view(-1, 2, kv_heads, dim)[:, part, head] for y in pair] for pair in pairs] for part in (0, 1))
        outputs = torch.cat([own @ out[layer, head].T for layer, (own, _) in enumerate(values)], dim=1)
        error = sum(((own - made) @ out[layer, head].T).square().sum() for layer, (own, made) in enumerate(values))
        torch.testing.assert_close(error, torch.linalg.svdvals(outputs)[dim:].square().sum())
        for pair in range(dim // 2):
            both, strong = [pair, pair + dim // 2], strength[:, head, pair]
            numbers = torch.stack([s.sqrt() * torch.complex(*own[:, both].T) for s, (own, _) in zip(strong, keys, strict=True)])
            error = sum(s * (own - made)[:, both].square().sum() for s, (own, made) in zip(strong, keys, strict=True))
            torch.testing.assert_close(error, torch.linalg.svdvals(numbers)[1:].square().sum())


def test_best_is_the_layer_that_explains_its_group_best(tmp_path: Path) -> None:
    read = source(tmp_path)
    without_change(read, [2])
    found = convert(read, target(read), "best", TEXT)
    block = [read.model.model.stages[0].layers[layer] for layer in (2, 3)]
    own = [(b.attn.k_proj.weight * b.attn_norm.weight).detach() for b in block]
    assert any(torch.allclose(found.model.model.global_kv.k_proj.weight, one, atol=1e-6) for one in own)
    assert found.explained is not None and max(found.explained) == pytest.approx(1.0, abs=1e-4)


def test_merging_global_kvs(tmp_path: Path) -> None:
    """From many to one in two steps: the mean of those that a group had."""
    read = source(tmp_path / "source", num_hidden_layers=8)
    write(convert(read, target(read, global_kvs=4), "mean"), read, tmp_path / "four")
    again = read_source(str(tmp_path / "four"))
    two = convert(again, target(again, global_kvs=2), "mean").model
    four = again.model.model.global_kv
    for name in ("k_proj", "v_proj"):
        parts = four.get_submodule(name).weight.view(2, 2, -1, 32)
        torch.testing.assert_close(two.model.global_kv.get_submodule(name).weight, parts.mean(1).flatten(0, 1))


def test_a_model_of_ours_keeps_its_stages_and_gates(tmp_path: Path) -> None:
    read = source(tmp_path / "source", num_hidden_layers=6)
    stages = [{"attention": "sliding", "layers": 2, "loops": 3, "loop_gate": 0.2}, {"attention": "cross", "layers": 4}]
    first = convert(read, target(read, stages=stages, window=16, global_kvs=4), "mean")
    with torch.no_grad():
        first.model.model.stages[0].loop_gates.copy_(torch.tensor([0.3, 0.7]))
    write(first, read, tmp_path / "first")
    again = read_source(str(tmp_path / "first"))
    fewer = convert(again, target(again, global_kvs=2), "mean").model
    assert fewer.model.architecture == first.model.model.architecture.model_copy(update={"global_kvs": 2})
    torch.testing.assert_close(fewer.model.stages[0].loop_gates, torch.tensor([0.3, 0.7]))
    whole = convert(again, target(again), "mean").model
    with torch.no_grad():
        torch.testing.assert_close(whole(ids()).logits, first.model(ids()).logits)
    for loops in (2, 5):
        other = convert(again, target(again, global_kvs=4, loops=loops), "mean").model
        assert other.model.architecture.stages[0].loops == loops
        with torch.no_grad():
            torch.testing.assert_close(other(ids()).logits, first.model(ids(), num_loops=loops).logits)


@pytest.mark.parametrize(
    ("preset", "loop_gate"), covering(["yoco_u", "universal_transformer", "rins", "upper_loop"], [0.4, None])
)
def test_loops_of_ours_stay_what_they_are(preset: str, loop_gate: float | None) -> None:
    """At any T, with the preset named or not; gates that the source lacks are closed."""
    window = {"window": 700} if preset in ("yoco_u", "upper_loop") else {}
    model = build(architecture(preset, loops=3, **({} if loop_gate is None else {"loop_gate": loop_gate}), **window))
    read, text = Source("ours", model, tokenizer(), torch.float32, None), ids(20) % 96
    for settings in ({}, {"loops": 5}, {"loops": 2}, {"preset": preset}, {"preset": preset, "loops": 4}):
        made = convert(read, target(read, **settings), "mean").model
        loops = settings.get("loops", 3)
        assert made.model.architecture == model.model.architecture.with_loops(loops)
        with torch.no_grad():
            torch.testing.assert_close(made(text).logits, model(text, num_loops=loops).logits)
    if preset == "rins":
        whole = target(read, preset="universal_transformer")
        assert (whole.num_loops, whole.stages[0].loop_gate) == (3, 0.0)


def test_loops_begin_harmless(tmp_path: Path) -> None:
    """With closed gates any loop count gives what one loop gives."""
    read = source(tmp_path)
    looped = convert(read, target(read, loops=3, window=16), "mean").model
    once = convert(read, target(read, window=16), "mean").model
    with torch.no_grad():
        expected = once(ids()).logits
        for loops in (1, 2, 3, 5):
            torch.testing.assert_close(looped(ids(), num_loops=loops).logits, expected)


def test_all_presets_that_have_a_place_for_every_layer(tmp_path: Path) -> None:
    read = source(tmp_path)
    for preset in PRESETS:
        model = convert(read, target(read, preset=preset), "mean").model
        assert model(ids(5)).logits.isfinite().all()
        if "cross" not in {stage.attention for stage in model.model.architecture.stages}:
            torch.testing.assert_close(model(ids(9)).logits, read.model(ids(9)).logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "yoco_v"}, "unknown preset 'yoco_v'"),
        ({"preset": "parscale"}, "unknown preset 'parscale'"),
        ({"preset": "yoco_retention"}, "unknown preset"),
        ({"windw": 3}, "windw cannot be set"),
        ({"hidden_size": 3}, "hidden_size cannot be set"),
        ({"global_kvs": 3}, "global_kvs is 3"),
        ({"layers": 3}, "layers"),
        ({"layers": 2}, "2 layers, the source 4"),
        ({"layers": "x"}, "layers"),
        ({"loops": 0}, "loops is 0"),
        ({"preset": "yoco", "loops": 2}, "no loop"),
        ({"window": 0}, "window"),
        ({"stages": [{"attention": "cross", "layers": 4}]}, "cross"),
        ({"stages": 3}, "stages"),
    ],
)
def test_targets_that_the_weights_do_not_fit(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    read = source(tmp_path)
    with pytest.raises(UserError, match=said):
        target(read, **settings)


def test_the_command_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = save(tmp_path / "source", "qwen3")
    folders = [str(tmp_path / name) for name in ("source", "ours", "back", "none")]
    assert main(["convert", folders[0], "preset=transformer", "--out", folders[1]]) == 0
    assert main(["convert", folders[1], "--back", "--out", folders[2]]) == 0
    assert "a qwen3, in" in capsys.readouterr().out
    back = AutoModelForCausalLM.from_pretrained(folders[2])
    with torch.no_grad():
        torch.testing.assert_close(back(ids()).logits, theirs(ids()).logits)
    assert main(["convert", folders[1], "window=8", "--back", "--out", folders[3]]) == 2
    assert main(["convert", folders[1], "window=8", "--kv", "mean", "--out", folders[3]]) == 0
    assert main(["convert", folders[3], "--back", "--out", str(tmp_path / "never")]) == 2
    assert "more than one stage" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("options", [["preset=transformer"], ["--back"], ["preset=transformer", "--remote-code"]])
def test_folders_on_the_way_to_the_result_are_made(tmp_path: Path, options: list[str]) -> None:
    save(tmp_path / "source", "llama")
    out = tmp_path / "some" / "where" / "out"
    assert main(["convert", str(tmp_path / "source"), *options, "--out", str(out)]) == 0
    assert (out / "config.json").is_file()
    assert main(["convert", str(tmp_path / "source"), *options, "--out", str(out / "config.json" / "out")]) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "source", "llama")
    command = ["convert", str(tmp_path / "source"), "window=16", "global_kvs=2", "--out", str(tmp_path / "ours")]
    assert main([*command, "--text", "stdlib", "--tokens", "2000"]) == 0
    assert "2 sliding + 2 cross, width 32, 2 global KVs" in capsys.readouterr().out
    model, tokenizer = load_model(tmp_path / "ours", torch.device("cpu"))
    assert model.model.architecture.window == 16 and model.config.max_position_embeddings == SHAPE["max_position_embeddings"]
    assert tokenizer.chat_template
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    assert main([*command[:-1], str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "x").read_text() == "x"
    assert main([*command[:-1], str(tmp_path / "new"), "--kv", "guess"]) == 2
    assert main(["convert", str(tmp_path / "nothing"), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["parscale", "yoco_retention", "yoco_u"])
def test_modelling_files_leave_a_model_of_ours_as_it_is(tmp_path: Path, name: str) -> None:
    build(architecture(name, vocab_size=300, experts=EXPERTS)).save_pretrained(tmp_path / "exact")
    model = YocoUForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.bfloat16)  # but for the balance of experts
    save_model(model, tokenizer(), tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), "--remote-code", "--out", str(tmp_path / "hub")]
    assert main(command) == 0
    stored, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "hub"))
    assert stored.keys() == again.keys()
    assert all(again[key].dtype == tensor.dtype and torch.equal(again[key], tensor) for key, tensor in stored.items())
    assert {path.name: path.read_text() for path in (tmp_path / "hub").glob("*.py")} == modelling_files()
    load_model(tmp_path / "hub", torch.device("cpu"))  # its checksums, those of the modelling files among them, are right
    assert "yoco_u_model_modeling.py" in (tmp_path / "hub" / "SHA256SUMS").read_text()


def test_modelling_files_of_a_converted_model(tmp_path: Path) -> None:
    save(tmp_path / "source", "llama")
    command = ["convert", str(tmp_path / "source"), "window=16", "--kv", "mean", "--remote-code", "--dtype", "bfloat16"]
    assert main([*command, "--out", str(tmp_path / "hub")]) == 0
    model, _ = load_model(tmp_path / "hub", torch.device("cpu"))
    assert model.model.architecture.has_global_kv and len(list((tmp_path / "hub").glob("*.py"))) == len(modelling_files())
    assert load_file(tmp_path / "hub" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_settings_that_generate_refuses_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "source", "llama")
    settings = {"temperature": 0.6, "do_sample": True, "chat_format": "chatml", "cache_implementation": "static"}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    command = ["convert", str(tmp_path / "source"), "--kv", "mean", "--out", str(tmp_path / "new")]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "no argument 'chat_format'" in said and "cache_implementation is 'static'" in said
    model, _ = load_model(tmp_path / "new", torch.device("cpu"))
    assert model.generation_config.temperature == 0.6
    assert model.generate(ids(5), max_new_tokens=3, pad_token_id=0).shape == (1, 8)


def test_a_loop_count_of_the_config_alone_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As fine-tuning with another one leaves it. Stages cannot say it, so the user says which is meant."""
    read = source(tmp_path / "source")
    made = convert(read, target(read, loops=3, loop_gate=0.3), "mean")
    made.model.config.num_loops = 5
    write(made, read, tmp_path / "tuned")
    command = ["convert", str(tmp_path / "tuned"), "--kv", "mean", "--out", str(tmp_path / "new")]
    assert main(command) == 2
    assert "num_loops of its config is 5, but its stages have 3; make a model" in capsys.readouterr().err
    with pytest.raises(UserError, match="num_loops of its config is 5"):
        saved_architecture(tmp_path / "tuned")
    assert main([*command, "loops=5"]) == 0
    assert saved_architecture(tmp_path / "new")["stages"][0]["loops"] == 5
    whole = read_source(str(tmp_path / "source"))
    whole.model.config.num_loops = 2
    for write_it in (write_back, write_gguf):
        with pytest.raises(UserError, match="num_loops of its config is 2, but its stages have 1"):
            write_it(whole, tmp_path / "back")


@pytest.mark.parametrize("options", [[], ["--back"], ["--gguf"]])
def test_an_unfinished_run_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x\n")
    assert main(["convert", str(tmp_path / "run"), *options, "--out", str(tmp_path / "new")]) == 2
    assert "run: the run is not finished (model/ is missing); run `yoco-u train` again" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("counts", [(1, 20), (20, 1), (1, 20, 1), (20, 1, 1)])
def test_what_one_text_lacks_for_a_fit_others_give(tmp_path: Path, counts: tuple[int, ...]) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(len(counts))]
    for file, count in zip(files, counts, strict=True):
        file.write_text("".join(json.dumps({"text": f"{number:02}" * 30}) + "\n" for number in range(count)))
    entries = tuple(str(file) for file in files)
    rows = calibration_rows(source(tmp_path / "source"), Calibration(entries, tokens=600, length=50))
    assert rows.shape == (12, 50)


def test_texts_that_are_too_few_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source(tmp_path / "source")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "ab" * 1500}) + "\n")
    command = ["convert", str(tmp_path / "source"), "--text", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "new")]
    for tokens, note in (("2000", "the texts have 1,024 tokens in whole rows, fewer than the 2,000 of --tokens"), ("1000", "")):
        assert main([*command, "--tokens", tokens, "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["tokens"] == 1024 and note in told.err and ("fewer" in told.err) == bool(note)


def test_special_tokens_are_spelled_by_chats_alone(tmp_path: Path) -> None:
    read = source(tmp_path / "source")
    end = read.tokenizer.eos_token
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"a{end}" * 9}) + "\n" for _ in range(9)))
    calibration = Calibration((str(tmp_path / "text.jsonl"),), tokens=80, length=16)
    counts = [
        int((calibration_rows(read, replace(calibration, special_tokens=special)) == read.tokenizer.eos_token_id).sum())
        for special in (False, True)
    ]
    assert counts[0] <= 9 < counts[1]
