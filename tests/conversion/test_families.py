"""Every family as our Transformer gives the logits of its own model, and what cannot be read is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, YARN, save, tokenizer, write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from yoco_u.conversion import convert, read_source, target_architecture, write, write_back
from yoco_u.errors import UserError
from yoco_u.loading import load_model


def ids(rows: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_those_of_the_source(tmp_path: Path, name: str) -> None:
    family, settings = FAMILIES[name]
    theirs = save(tmp_path, family, **settings)
    read = read_source(str(tmp_path))
    target = target_architecture(read.model.model.architecture, {"preset": "transformer"})
    for ours in (read.model, convert(read, target, "mean").model):
        with torch.no_grad():
            torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)


SCALED = {"rope_theta": 1000.0, "rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
EDITED: dict[str, dict[str, Any]] = {
    "a window that a Llama does not have": {"sliding_window": 8, "use_sliding_window": True},
    "kinds of layers that a Llama does not have": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4},
    "a scaling without its length": SCALED,
    "a scaling with its length beside it": SCALED | {"original_max_position_embeddings": 64},
    "a tied head that is another": {"tie_word_embeddings": True},
    "a field of another family": {"final_logit_softcapping": 5.0, "qk_norm": True},
}


@pytest.mark.parametrize("name", EDITED)
def test_a_config_means_what_transformers_takes_it_for(tmp_path: Path, name: str) -> None:
    save(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | EDITED[name]))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    source = read_source(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(source.model(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)
    write(convert(source, source.model.config.architecture), source, tmp_path / "ours")
    loaded, _ = load_model(tmp_path / "ours", torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, source.model(ids()).logits)


def test_weights_of_eight_bits_without_scales(tmp_path: Path) -> None:
    theirs = save(tmp_path, "llama")
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = read_source(str(tmp_path)).model.state_dict()
    assert torch.equal(found["model.norm.weight"], weights["model.norm.weight"].float())


@pytest.mark.parametrize("name", FAMILIES)
def test_written_back_it_is_the_source_again(tmp_path: Path, name: str) -> None:
    family, settings = FAMILIES[name]
    theirs = save(tmp_path / "source", family, **settings)
    write_back(read_source(str(tmp_path / "source")), tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.model_type == ("llama" if name == "mistral" else family)
    for (key, tensor), (_, again) in zip(sorted(theirs.state_dict().items()), sorted(back.state_dict().items()), strict=True):
        assert torch.equal(tensor, again), key
    with torch.no_grad():
        torch.testing.assert_close(back(ids()).logits, theirs(ids()).logits, rtol=1e-5, atol=1e-5)


def test_a_gguf_file_gives_the_logits_of_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    theirs = save(tmp_path / "source", "llama")
    write_gguf(tmp_path / "model.gguf", theirs)
    source = read_source(str(tmp_path / "model.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(source.model(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("begins", [True, False])
def test_what_comes_along(tmp_path: Path, begins: bool) -> None:
    save(tmp_path / "source", "llama", begins, torch.bfloat16)
    GenerationConfig(temperature=0.7, top_p=0.9, do_sample=True, eos_token_id=[1, 5]).save_pretrained(tmp_path / "source")
    source = read_source(str(tmp_path / "source"))
    target = target_architecture(source.model.model.architecture, {"preset": "transformer"})
    write(convert(source, target), source, tmp_path / "ours")
    again = read_source(str(tmp_path / "ours"))
    assert again.dtype == source.dtype == torch.bfloat16
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.generation is not None and again.generation.temperature == 0.7 and again.generation.eos_token_id == [1, 5]
    _, ours = load_model(tmp_path / "ours", torch.device("cpu"))
    assert ours.chat_template == tokenizer().chat_template
    text = "def f(x):\n"
    bare = AutoTokenizer.from_pretrained(tmp_path / "source")(text, add_special_tokens=False).input_ids
    assert ours(text, add_special_tokens=False).input_ids == bare
    assert ours(text).input_ids == [0 if begins else 1, *bare]  # its own start token, or else the one that ends documents
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(text).input_ids == ours(text).input_ids


LACKING: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases of all": ("llama", {"attention_bias": True}, "attention_bias"),
    "biases of the feed-forward": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "another activation": ("mistral", {"hidden_act": "gelu", "sliding_window": None}, "hidden_act 'gelu'"),
    "scaling that depends on the length": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic",
    ),
    "a part of each head": ("llama", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "a part of each head"),
    "mixed layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "full_attention and sliding",
    ),
    "another family": ("gpt_neox", {}, "model_type is 'gpt_neox'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_what_our_blocks_lack_is_named(tmp_path: Path, name: str) -> None:
    family, settings, said = LACKING[name]
    save(tmp_path, family, **settings)
    with pytest.raises(UserError, match=said):
        read_source(str(tmp_path))


def _without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def _another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, folder / "model.safetensors")


def _one_more(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"model.layers.0.extra": torch.zeros(1)}, folder / "model.safetensors")


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[3] ^= 0x40
    (folder / "model.safetensors").write_bytes(data)


def _small_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


YARN_OF_FOUR = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"rope_parameters": None} | config | changes))


def _deep(folder: Path) -> None:
    _edit(folder, num_hidden_layers=10**9)


def _index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGE = {
    "a RoPE scaling in words": (
        lambda f: _edit(f, rope_scaling={"rope_type": "yarn", "factor": "4", "original_max_position_embeddings": 64}),
        "the config's RoPE settings make no sense",
    ),
    "a RoPE base of 1": (lambda f: _edit(f, rope_theta=1, rope_scaling=YARN_OF_FOUR), "make no sense|rope_theta"),
    "adapters": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json: adapters lie beside"),
    "more layers than tensors": (_deep, "the config has 1,000,000,000 layers, but the weights have"),
    "a missing tensor": (
        lambda f: _without(f, "model.layers.2.self_attn.v_proj.weight"),
        "self_attn.v_proj.weight is missing",
    ),
    "a missing head": (lambda f: _without(f, "lm_head.weight"), "lm_head.weight is missing"),
    "another shape": (_another_shape, r"layers.1.mlp.up_proj.weight has shape \(3, 5\); the config says \(48, 32\)"),
    "one tensor more": (_one_more, "layers.0.extra is none of its family"),
    "not finite": (_not_finite, "model.norm.weight has values that are not finite"),
    "damaged weights": (_flip, "model.safetensors: damaged"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "model.safetensors: damaged"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors: the file is missing; only safetensors are read",
    ),
    "a missing shard": (
        lambda f: _index(f, {"a": "model-2.safetensors"}),
        "model-2.safetensors: the file is missing",
    ),
    "an index that is none": (
        lambda f: _index(f, ["model.safetensors"]),
        "index.json: weight_map: Input should be a valid dictionary",
    ),
    "an index that points elsewhere": (
        lambda f: _index(f, {"a": "../model.safetensors"}),
        "index.json: names '../model.safetensors', which is no file of the folder",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config"),
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), "cannot read the config"),
    "no tokenizer": (lambda f: [one.unlink() for one in f.glob("tokenizer*")], "tokenizer"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
    "a small vocabulary": (_small_vocabulary, "the tokenizer has ids up to 257, but the vocabulary has 100"),
    "a damaged generation config": (
        lambda f: (f / "generation_config.json").write_text("["),
        "generation_config.json: damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    save(tmp_path, "llama")
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        read_source(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"x" * 100])
def test_a_damaged_gguf_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.gguf: cannot be read as GGUF"):
        read_source(str(file))


def test_a_cut_gguf_file_is_named_in_one_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", save(tmp_path / "source", "llama"))
    (tmp_path / "adapter_config.json").write_text("{}")  # which transformers would take for the file's own
    with pytest.raises(UserError, match=r"adapter_config\.json: adapters lie beside"):
        read_source(str(tmp_path / "model.gguf"))
    (tmp_path / "adapter_config.json").unlink()
    data = (tmp_path / "model.gguf").read_bytes()
    for size in (len(data) // 3, len(data) - 100):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.gguf: cannot be read as GGUF"):
            read_source(str(tmp_path / "cut.gguf"))


def test_an_index_that_was_left_behind_is_not_read(tmp_path: Path) -> None:
    """As transformers itself leaves it in a folder where shards were, and reads the one file."""
    theirs = save(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    read = read_source(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(read.model(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)
