"""GGUF files of other writers: they are read as they are meant, and what cannot be read of them is refused by name."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import YARN
from test_gguf import TEXTS, ids, rounded, source, tokenizer
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast

from yoco_u.conversion import read_source, write_gguf
from yoco_u.conversion.families import FAMILIES, architecture_of
from yoco_u.conversion.gguf_reader import FACTORS, check_tensors, gguf_names, unread_settings
from yoco_u.conversion.gguf_tokenizer import restored
from yoco_u.errors import UserError

KINDS = gguf.GGUFValueType
TYPES = {bool: KINDS.BOOL, str: KINDS.STRING, int: KINDS.UINT32, float: KINDS.FLOAT32}


def changed(
    path: Path, settings: dict[str, Any] | None = None, without: Collection[str] = (), tensors: dict[str, Any] | None = None
) -> Path:
    """Write a GGUF file again with other settings and tensors, beside it, and without some of both."""
    reader, settings, tensors = gguf.GGUFReader(path), settings or {}, tensors or {}
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in {*without, *settings}:
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    for name, value in settings.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, TYPES[type(value)])
    for tensor in reader.tensors:
        if tensor.name not in {*without, *tensors}:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a Llama."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(source(folder / "source", num_hidden_layers=2), folder / "model.gguf")
    return folder / "model.gguf"


def ones(*shape: int) -> tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]:
    return np.ones(shape, np.float32), gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("family", FAMILIES)
def test_files_have_all_tensors_of_their_family_and_no_others(tmp_path: Path, family: str) -> None:
    settings = {"mistral": {"sliding_window": None}, "qwen2": {"tie_word_embeddings": True}}.get(family, {})
    read = source(tmp_path / "source", family, num_hidden_layers=2, **settings)
    a = read.model.model.architecture
    write_gguf(read, tmp_path / "model.gguf")
    names = frozenset(tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    assert set(gguf_names(a, family).values()) == names
    check_tensors(a, family, names | {FACTORS}, tmp_path)
    for name in names:
        with pytest.raises(UserError, match=rf"the tensor {name} is missing"):
            check_tensors(a, family, names - {name}, tmp_path)
    for name in ("blk.0.attn_output.bias", "blk.2.ffn_up.weight", "blk.1.attn_q.scale", "rope_factors_long.weight"):
        with pytest.raises(UserError, match=rf"the tensor {name} is none of its family; 1 tensors would be lost"):
            check_tensors(a, family, names | {name}, tmp_path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"])
def test_nothing_random_takes_the_place_of_a_tensor(written: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"changed\.gguf: the tensor {name} is missing; "):
        read_source(str(changed(written, without=[name])))
    monkeypatch.setattr("yoco_u.conversion.source.check_tensors", lambda *_: None)  # as if transformers had passed it over
    with pytest.raises(UserError, match=r"changed\.gguf: the tensor model\..*weight is missing; "):
        read_source(str(changed(written, without=[name])))


def test_other_tensors_are_refused(written: Path) -> None:
    with pytest.raises(UserError, match=r"changed\.gguf: the tensor blk\.0\.attn_q\.bias is none of its family"):
        read_source(str(changed(written, tensors={"blk.0.attn_q.bias": ones(32)})))
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(47, 32\); the config says \(48, 32\)$"):
        read_source(str(changed(written, tensors={"blk.1.ffn_up.weight": ones(47, 32)})))


def test_a_file_without_a_head_has_the_embedding_for_it(written: Path) -> None:
    model, whole = (read_source(str(path)).model for path in (changed(written, without=["output.weight"]), written))
    assert model.model.architecture.tie_word_embeddings
    with torch.no_grad():
        expected = whole.model(ids()).last_hidden_state @ whole.model.embed_tokens.weight.T
        torch.testing.assert_close(model(ids()).logits, expected)


YARNS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}
NEUTRAL = {"scaling.yarn_ext_factor": 1.0, "scaling.yarn_attn_factor": 1.1386294, "scaling.finetuned": 1}
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the old name": ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "both names": ({"scale_linear": 4.0, "scaling.factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    "a factor that has no effect": ({"scaling.type": "none", "scaling.factor": 3.0}, {}),
    "a type without a factor": ({"scaling.type": "linear"}, {"rope_type": "linear", "factor": 1.0}),
    "yarn of the whole context": (
        {"scaling.type": "yarn", "scaling.factor": 4.0}, YARN | {"original_max_position_embeddings": 256},
    ),
    "yarn with turns": (
        YARNS | {"scaling.yarn_beta_fast": 8.0, "scaling.yarn_beta_slow": 2.0}, YARN | {"beta_fast": 8, "beta_slow": 2},
    ),
    "yarn as it is anyway": (YARNS | NEUTRAL, YARN),
    "yarn with a factor": (YARNS | {"scaling.attn_factor": 1.5}, YARN | {"attention_factor": 1.5 * 1.1386294}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_rope_is_scaled_as_the_file_says(written: Path, name: str) -> None:
    settings, parameters = SCALED[name]
    expected, found = (AutoConfig.from_pretrained(written.parent / "source") for _ in range(2))
    expected.rope_parameters = {"rope_type": "default"} | parameters | {"rope_theta": 10000.0}
    path = changed(written, {f"llama.rope.{name}": value for name, value in settings.items()})
    for field, value in unread_settings(path).config.items():
        setattr(found, field, value)
    assert rounded(architecture_of(found, "").model_dump()) == rounded(architecture_of(expected, "").model_dump())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dimension_count": 4}, r"dimension_count is 4, but only 8 can be read; convert the folder"),
        ({"scaling.yarn_ext_factor": 0.0}, r"scaling\.yarn_ext_factor is 0, but only 1 can"),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_attn_factor": 2.0},
            r"attn_factor is 2, but only 1\.13863",
        ),
        ({"scaling.attn_factor": 2.0}, r"scaling\.attn_factor is 2, but only 1 can"),
        ({"scaling.alpha": 2.0}, r"scaling\.alpha is 2\.0, a setting that is not known"),
        ({"dimension_sections": [2, 2, 0, 0]}, r"dimension_sections is \[2, 2, 0, 0\], a setting"),
        ({"scaling.type": "longrope"}, r"RoPE scaling 'longrope'; known are linear, llama3 and yarn"),
    ],
)
def test_rope_that_is_not_known_is_refused(written: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_source(str(changed(written, {f"llama.rope.{name}": value for name, value in settings.items()})))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("attention.scale", 0.5, r"is 0\.5, but only 0\.353553 can be read; convert the folder"),
        ("attention.value_length", 4, "is 4, but only 8 can"),
        ("attention.causal", False, "is False, but only 1 can"),
        ("attention.sliding_window", 16, "is 16, but only 0 can"),
        ("logit_scale", 2.0, "is 2, but only 1 can"),
        ("attention.clamp_kqv", 8.0, r"is 8\.0, a setting that is not known"),
    ],
)
def test_settings_of_other_blocks_are_refused(written: Path, setting: str, value: float, said: str) -> None:
    with pytest.raises(UserError, match=rf"changed\.gguf: llama\.{setting} {said}"):
        unread_settings(changed(written, {f"llama.{setting}": value}))
    unread_settings(changed(written, {"llama.attention.scale": 8**-0.5, "llama.logit_scale": 1.0}))


@pytest.mark.parametrize("words", ["llama-bpe", "tekken", "dbrx"])
def test_texts_begin_as_in_llama_cpp_where_a_file_does_not_say(written: Path, words: str) -> None:
    settings, key = {"tokenizer.ggml.pre": words}, "tokenizer.ggml.add_bos_token"
    for said in (None, True, False):
        path = changed(written, settings, [key]) if said is None else changed(written, settings | {key: said})
        start = read_source(str(path)).tokenizer("a").input_ids[0]
        assert start == (0 if (words != "dbrx" if said is None else said) else 1)  # <s>, else </s>


@pytest.mark.parametrize("name", ["scale_linear", "scaling.factor"])
def test_rope_that_is_scaled_twice_is_refused(written: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"llama\.rope\.{name} is 2, but only 1 can be read"):
        read_source(str(changed(written, {f"llama.rope.{name}": 2.0}, tensors={FACTORS: ones(4)})))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("gpt-2", ["phi-2", "olmo"]),
        ("smollm", ["starcoder", "refact"]),
        ("llama-bpe", ["llama3", "llama-v3", "falcon3"]),
        ("dbrx", ["smaug-bpe"]),
        ("qwen2", ["deepseek-r1-qwen"]),
    ],
)
def test_other_names_of_the_same_words(written: Path, words: str, names: list[str]) -> None:
    own = tokenizer(words)
    unread = unread_settings(written)._replace(tokens=len(own))
    if words == "qwen2":  # the others do not bring texts into a normal form
        own.backend_tokenizer.normalizer = None
    backend = Tokenizer.from_str(own.backend_tokenizer.to_str())
    backend.pre_tokenizer, backend.model.ignore_merges = None, False
    for name in names:
        again = restored(PreTrainedTokenizerFast(tokenizer_object=backend), unread._replace(pre=name), "")
        for text in TEXTS:
            assert again(text).input_ids == own(text).input_ids, text


@pytest.mark.parametrize("name", ["default", "deepseek-coder", "nonsense", None])
def test_words_without_a_known_name_are_refused(written: Path, name: str | None) -> None:
    key = "tokenizer.ggml.pre"
    with pytest.raises(UserError, match=rf"tokenizer\.ggml\.pre is {name!r}.*gpt-2.*qwen2.*safetensors instead$") as error:
        read_source(str(changed(written, without=[key]) if name is None else changed(written, {key: name})))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("templates", [{"default": "D", "tool_use": "T", "a-b c": "R"}, {"tool_use": "T"}, None])
def test_all_chat_templates_are_in_the_file(written: Path, tmp_path: Path, templates: dict[str, str] | None) -> None:
    source = read_source(str(written))
    source.tokenizer.chat_template = templates
    write_gguf(source, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    for name, template in (templates or {}).items():
        assert fields["tokenizer.chat_template" + ("" if name == "default" else f".{name}")].contents() == template
    assert read_source(str(tmp_path / "model.gguf")).tokenizer.chat_template == templates


@pytest.mark.parametrize(("first", "others", "expected"), [
    ("F16", "F16", "float16"), ("BF16", "BF16", "bfloat16"), ("F32", "F32", "float32"), ("F16", "BF16", "float32"),
    ("F16", "Q8_0", "float32"), ("Q8_0", "Q8_0", "float32"),
])  # fmt: skip
def test_the_dtype_is_that_of_the_matrices(written: Path, first: str, others: str, expected: str) -> None:
    tensors = {}
    for tensor in gguf.GGUFReader(written).tensors:
        if tensor.data.ndim > 1:
            kind = gguf.GGMLQuantizationType[first if "token_embd" in tensor.name else others]
            tensors[tensor.name] = np.resize(tensor.data, (len(tensor.data), 32)), kind
    assert unread_settings(changed(written, tensors=tensors)).dtype == getattr(torch, expected)
