"""GGUF files that are written give the model and the tokenizer that they were made of; what llama.cpp lacks is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import FAMILIES, SHAPE, YARN, save
from models import EVERYTHING, EXPERTS, PRESETS, architecture, build
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from yoco_u.architecture import Architecture
from yoco_u.cli import main
from yoco_u.conversion import Source, read_source, write_gguf
from yoco_u.data import train_tokenizer
from yoco_u.errors import UserError
from yoco_u.model import save_model

# As the makers of these tokenizers published the patterns.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "", " ", "Hello  wörld's CAMELCase isn't it?\n\n  x = 3.14159 + 1234567;\t\r\nend   ", "e\u0301 ŉ \u212b ﬁ",
    "日本語 \u200d👩‍👩‍👧 ",
    "   2024 20 24", "<|end|> a<tool>b <s>", "'S 'LL \u00a0\u3000 ∑ x\u0300\u0301", "\n \n  \n\n", "/* */ __init__ /\n//\r\n",
)  # fmt: skip
CORPUS = [text + "def function(x): return the isn't 'll 2024 199 \n\n    x += 1\n" * 3 for text in TEXTS]


def cut(name: str) -> tuple[Any, bool, bool]:
    """The pre-tokenizer of llama.cpp's name, and whether `ignore_merges` and NFC belong to it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {"llama-bpe": LLAMA3, "dbrx": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}
    if name in split:
        steps = [pre_tokenizers.Split(Regex(split[name]), "isolated"), byte_level]
        return pre_tokenizers.Sequence(steps), name in ("llama-bpe", "tekken"), name == "qwen2"
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return (gpt2 if name == "gpt-2" else pre_tokenizers.Sequence([digits, gpt2])), False, False


def tokenizer(name: str, begins: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, whole, nfc = cut(name)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.ignore_merges = whole
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    if begins:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<|end|>")
    made.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    return made


def source(folder: Path, family: str = "llama", words: str = "gpt-2", begins: bool = False, **settings: Any) -> Source:
    """A checkpoint as our Transformer."""
    save(folder, family, **settings)
    tokenizer(words, begins).save_pretrained(folder)
    return read_source(str(folder))


def ids() -> torch.Tensor:
    return torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(3))


def rounded(value: Any) -> Any:
    """Plain data with numbers in the 24 bits that GGUF files have for them."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


NOT_HERE = ("llama", "mistral with a window", "llama, yarn with all settings")  # the last two are refused
EXPRESSIBLE = {
    **{name: one for name, one in FAMILIES.items() if name not in NOT_HERE},
    "llama, yarn with a factor": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_it_is_the_same_model(tmp_path: Path, name: str) -> None:
    family, settings = EXPRESSIBLE[name]
    if family == "qwen3":
        settings = settings | {"head_dim": 128}  # the only one that transformers expects of a Qwen3 in a GGUF file
    theirs = save(tmp_path / "source", family, **settings)
    tokenizer("gpt-2").save_pretrained(tmp_path / "source")
    read = read_source(str(tmp_path / "source"))
    kind = write_gguf(read, tmp_path / "model.gguf")
    assert kind == ("llama" if family == "mistral" else family)
    again = read_source(str(tmp_path / "model.gguf"))
    assert rounded(again.model.model.architecture.model_dump()) == rounded(read.model.model.architecture.model_dump())
    with torch.no_grad():
        expected = theirs(ids()).logits
        torch.testing.assert_close(again.model(ids()).logits, expected, rtol=1e-4, atol=1e-4)
        for key, tensor in read.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[key], tensor), key
        config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
        config.rope_parameters = theirs.config.rope_parameters  # which transformers does not read from a GGUF file
        back = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, gguf_file="model.gguf", dtype=torch.float32)
        torch.testing.assert_close(back(ids()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_have_the_dtype_of_the_source(tmp_path: Path, dtype: torch.dtype) -> None:
    source(tmp_path / "source", dtype=dtype)
    write_gguf(read_source(str(tmp_path / "source")), tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {expected}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    again = read_source(str(tmp_path / "model.gguf"))
    assert again.dtype == dtype
    stored = load_file(tmp_path / "source" / "model.safetensors")
    assert torch.equal(again.model.state_dict()["model.embed_tokens.weight"], stored["model.embed_tokens.weight"].float())


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ("gpt-2", False),
        ("gpt-2", True),
        ("smollm", False),
        ("llama-bpe", True),
        ("dbrx", False),
        ("qwen2", False),
        ("tekken", True),
    ],
)
def test_it_is_the_same_tokenizer(tmp_path: Path, words: str, begins: bool) -> None:
    read = source(tmp_path / "source", words=words, begins=begins)
    write_gguf(read, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == words
    assert fields["tokenizer.ggml.add_bos_token"].contents() == begins
    kinds = fields["tokenizer.ggml.token_type"].contents()
    own = read.tokenizer
    assert len(kinds) == SHAPE["vocab_size"]
    for token, kind in {"<s>": 3, "<|end|>": 3, "<tool>": 4, "a": 1}.items():
        assert kinds[own.convert_tokens_to_ids(token)] == kind
    assert kinds[-1] == 5 and fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD299]"
    again = read_source(str(tmp_path / "model.gguf")).tokenizer
    published = AutoTokenizer.from_pretrained(tmp_path / "source")
    by_transformers = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        expected = published(text, add_special_tokens=False).input_ids
        assert again(text, add_special_tokens=False).input_ids == expected, text
        assert again(text).input_ids == own(text).input_ids, text
        assert again.decode(expected) == published.decode(expected)
        is_nfc = text == normalizers.NFC().normalize_str(text)
        if words in ("gpt-2", "dbrx") or (words == "qwen2" and is_nfc):  # of the others, transformers does not read everything
            assert by_transformers(text, add_special_tokens=False).input_ids == expected, text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(again, name) == getattr(published, name), name


def scaled(scaling: dict[str, Any], **settings: Any) -> Architecture:
    scaling = {"factor": 2.0, "original_length": 16} | scaling
    return architecture("transformer", vocab_size=300, rotary_scaling=scaling, **settings)


OTHERS = {
    **{name: architecture(name, vocab_size=300) for name in PRESETS if name != "transformer"},
    "experts": architecture("transformer", vocab_size=300, experts=EXPERTS),
    "biases and norms": architecture("transformer", vocab_size=300, attention_bias=True, qk_norm=True),
    "everything": architecture("yoco_u", vocab_size=300, **EVERYTHING),
    "a window": architecture("transformer", vocab_size=300, stages=[{"attention": "sliding", "layers": 2}], window=8),
    "yarn without truncate": scaled({"type": "yarn", "high_turns": 32.0, "truncate": False}),
    "yarn with other turns": scaled({"type": "yarn", "high_turns": 32.0, "low_turns": 2.0}),
    "llama 3 with biases": scaled({"type": "llama3"}, attention_bias=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_llama_cpp_has_no_code_for_is_refused(tmp_path: Path, name: str) -> None:
    read = Source("mine", build(OTHERS[name]), train_tokenizer(["a"], 280), torch.float32, None)
    with pytest.raises(UserError, match=r"^mine: the model.*llama\.cpp.* has no code") as error:
        write_gguf(read, tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def _another(change: Any) -> Tokenizer:
    made = tokenizer("gpt-2")
    change(made.backend_tokenizer)
    return made


def _words(backend: Tokenizer, steps: Any) -> None:
    backend.pre_tokenizer = steps


def _byte_fallback() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1, "<0x41>": 2, "▁": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, tuple[Any, str]] = {
    "trained here": (lambda: train_tokenizer(["def f(x): return x"], 290), "like those that yoco-u trains"),
    "no words": (lambda: _another(lambda b: _words(b, pre_tokenizers.ByteLevel(use_regex=False))), "no name of llama.cpp"),
    "a space first": (lambda: _another(lambda b: _words(b, pre_tokenizers.ByteLevel(add_prefix_space=True))), "no name of"),
    "groups of digits": (
        lambda: _another(
            lambda b: _words(b, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]))
        ),
        "no name of llama.cpp",
    ),
    "lower case": (
        lambda: _another(lambda b: setattr(b, "normalizer", normalizers.Lowercase())), r"changes texts first \(Lowercase",
    ),
    "sentence pieces": (_byte_fallback, "is no byte-level BPE"),
    "a greedy token": (
        lambda: _another(lambda b: b.add_tokens([AddedToken("<mask>", lstrip=True)])), "has a token '<mask>' with lstrip",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_no_file_can_say_are_refused(tmp_path: Path, name: str) -> None:
    make, said = TOKENIZERS[name]
    read = Source("mine", build(architecture("transformer", vocab_size=300)), make(), torch.float32, None)
    with pytest.raises(UserError, match=rf"^mine: the tokenizer.*{said}") as error:
        write_gguf(read, tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = source(tmp_path / "source")
    with torch.no_grad():
        read.model.get_submodule("lm_head").weight[3, 3] = 1e6
    save_model(read.model, read.tokenizer, tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), "--gguf", "--out", str(tmp_path / "model.gguf")]
    assert main([*command, "--dtype", "float16"]) == 2
    assert "output.weight has values that are not finite in torch.float16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    for options in (["--kv", "mean"], ["--back"]):
        assert main(["convert", str(tmp_path / "ours"), *options, "--out", str(tmp_path / "new"), "--dtype", "float16"]) == 2
        assert "lm_head.weight has values that are not finite in torch.float16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    assert main([*command, "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize("dtype", ["int8", "nn", "float64", None, 3])
def test_a_dtype_that_weights_are_not_written_in_is_float32(tmp_path: Path, dtype: object) -> None:
    read = source(tmp_path / "source")
    save_model(read.model, read.tokenizer, tmp_path / "ours")
    (tmp_path / "ours" / "SHA256SUMS").unlink()
    file = tmp_path / "ours" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
    try:
        assert read_source(str(tmp_path / "ours")).dtype == torch.float32
    except UserError as error:
        assert "\n" not in str(error)


def test_scaling_that_a_file_does_not_say_is_refused(tmp_path: Path) -> None:
    family, settings = FAMILIES["llama 3"]
    write_gguf(source(tmp_path / "source", family, **settings), tmp_path / "model.gguf")
    tensor = next(one for one in gguf.GGUFReader(tmp_path / "model.gguf", "r+").tensors if one.name == "rope_freqs.weight")
    tensor.data[0] = 1.7
    tensor.data.flush()
    with pytest.raises(UserError, match="factors that are not Llama 3's"):
        read_source(str(tmp_path / "model.gguf"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source(tmp_path / "source")
    command = ["convert", str(tmp_path / "source"), "--gguf", "--out"]
    for _ in range(2):  # a file of ours is written again
        assert main([*command, str(tmp_path / "model.gguf")]) == 0
        assert "a llama, in" in capsys.readouterr().out
    (tmp_path / "mine.gguf").write_bytes(b"GGUF, and years of work")
    (tmp_path / "other").mkdir()
    for arguments, said in (
        (["mine.gguf"], "was not made by yoco-u"),
        (["source"], "is what is converted"),
        (["other"], "is a folder"),
        (["new", "--back"], "--back and --gguf cannot both be"),
        (["new", "--remote-code"], "--gguf and --remote-code cannot both be"),
        (["new", "loops=2"], "--gguf changes nothing about the model"),
        (["new", "--dtype", "int3"], "--dtype is 'int3'; expected float32, bfloat16, float16"),
    ):
        assert main([*command, str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine.gguf").read_bytes() == b"GGUF, and years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.gguf", "model.gguf", "other", "source"]
