"""What a call, a config or `from_pretrained` may say: each keyword does what it says, or is refused; none is passed over."""

import json
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from examples import covering
from models import EXPERTS, architecture, build, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.utils.generic import TransformersKwargs

from yoco_u import YocoUConfig, YocoUForCausalLM, YocoUModel
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings
from yoco_u.model import YocoUCache, keywords
from yoco_u.model.loss import EarlyExit, SoftTargets

N = 12
GATED = architecture("yoco_u", loop_gate=0.3)


@cache
def plain() -> YocoUForCausalLM:
    return build(architecture())


def test_every_keyword_of_transformers_is_followed_or_refused() -> None:
    """A new version that knows another keyword fails here until someone decides what it does."""
    named = set(signature(YocoUForCausalLM.forward).parameters)
    assert set(TransformersKwargs.__optional_keys__) <= named | {*keywords.OF_MODEL, *keywords.OF_LOSS}


def test_what_changes_nothing_is_accepted() -> None:
    model, ids = build(architecture()), tokens(2, N)
    expected = model(ids, labels=ids)
    same: list[dict[str, Any]] = [
        {"attention_mask": torch.ones_like(ids)},
        {"position_ids": torch.arange(N)[None]},
        {"seq_idx": torch.zeros(2, N, dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, N, 2 * N]), "max_length_q": N, "max_length_k": N},
        {"inputs_embeds": model.get_input_embeddings()(ids), "input_ids": None},
        {"use_cache": False},
        {"past_key_values": YocoUCache(model.model.architecture)},
        {"output_attentions": False, "output_hidden_states": None, "output_router_logits": None, "is_causal": True},
        {"logits_to_keep": N},
        {"num_loops": 3},
        {"num_items_in_batch": 2 * (N - 1)},
        {"return_dict": True},
    ]
    for call in same:
        out = model(**{"input_ids": ids, "labels": ids} | call)
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.loss, expected.loss)
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[0], expected.loss) and torch.equal(as_tuple[1], expected.logits)


def test_return_dict_of_the_config() -> None:
    model, ids = build(architecture()), tokens(2, N)
    expected = model(ids).logits
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_loop": 5}, "has no argument 'num_loop'; did you mean num_loops"),
    ({"num_logits_to_keep": 1}, "did you mean logits_to_keep"),
    ({"attn_mask": torch.ones(2, N)}, "did you mean attention_mask"),
    ({"label": tokens(2, N)}, "did you mean labels"),
    ({"document_id": torch.ones(2, N)}, "did you mean document_ids"),
    ({"output_attention": True}, "did you mean output_attentions"),
    ({"token_type_ids": torch.zeros(2, N)}, "has no argument 'token_type_ids'"),
    ({"cache_position": torch.arange(N)}, "has no argument 'cache_position'"),
    ({"qzx": 1}, "known are attention_mask, "),
    ({"output_attentions": True}, "output_attentions is True, but"),
    ({"output_router_logits": True}, "output_router_logits is True, but"),
    ({"is_causal": False}, "is_causal is False, but"),
    ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
    ({"past_key_values": []}, "past_key_values is a list"),
    ({"logits_to_keep": -1}, "logits_to_keep is -1"),
    ({"logits_to_keep": True}, "logits_to_keep is True"),
    ({"logits_to_keep": 3.0}, "logits_to_keep is 3.0"),
    ({"logits_to_keep": torch.tensor([0, N])}, rf"logits_to_keep has the index {N}; expected -{N} \.\. {N - 1}"),
    ({"logits_to_keep": torch.tensor([-N - 1])}, f"logits_to_keep has the index -{N + 1}"),
    ({"logits_to_keep": torch.zeros(1, 2, dtype=torch.long)}, "logits_to_keep has dtype"),
    ({"logits_to_keep": torch.ones(N, dtype=torch.bool)}, "logits_to_keep has dtype torch.bool"),
    ({"position_ids": torch.ones(2, N, dtype=torch.bool)}, "position_ids has dtype torch.bool"),
    ({"input_ids": tokens(2, N)[:, :0]}, r"rows have shape \(2, 0\)"),
    ({"input_ids": tokens(2, N)[:0]}, rf"rows have shape \(0, {N}\)"),
    ({"early_exit": EarlyExit(1, 1.0), "use_cache": False}, "early_exit adds to a loss"),
    ({"labels": tokens(N, 2)}, "labels has shape"),
    ({"labels": tokens(1, N)}, "labels has shape"),
    ({"shift_labels": tokens(2, N - 1)}, "shift_labels has shape"),
    ({"labels": tokens(2, N), "logits_to_keep": 1}, "labels has shape"),
    ({"num_loops": 0}, "num_loops is 0"),
    ({"input_ids": tokens(1, N)[0]}, "expected rows of tokens"),
    ({"input_ids": None, "inputs_embeds": torch.zeros(N, 32)}, "expected rows of tokens"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[" ".join(call) for call, _ in WRONG])
def test_what_the_model_does_not_do_is_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        plain()(**{"input_ids": tokens(2, N)} | call)
    assert "\n" not in str(error.value)


def test_the_body_refuses_what_the_head_would_have_used() -> None:
    body = build(architecture()).model
    for call in ({"labels": tokens(2, N)}, {"num_items_in_batch": 3}, {"num_loop": 2}):
        with pytest.raises(UserError, match="YocoUModel has no argument"):
            body(tokens(2, N), **call)


# The loop count


@pytest.mark.parametrize(("name", "loops"), covering(["yoco_u", "gated", "upper_loop", "yoco"], [1, 5]))
def test_the_loop_count_of_configs_is_followed(name: str, loops: int, tmp_path: Path) -> None:
    """By `from_pretrained`, by what it saves, by `generate()` and by the engine; a call's own count goes before it."""
    arch = GATED if name == "gated" else architecture(name)
    model, ids = build(arch, pad_token_id=0), tokens(1, N).clamp(min=1)
    expected, others = model(ids, num_loops=loops).logits, model(ids, num_loops=4).logits
    call = {"max_new_tokens": 4, "do_sample": False}
    generated = model.generate(ids, num_loops=loops, **call)
    for settings in (GenerationConfig(num_loops=loops, **call), GenerationConfig(num_loops=4, **call)):
        overrides = {} if settings.num_loops == loops else {"num_loops": loops}
        assert torch.equal(model.generate(ids, settings, **overrides), generated)

    model.save_pretrained(tmp_path / "stored")
    for cls in (YocoUForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "stored", num_loops=loops).eval()
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(loaded(ids, num_loops=4).logits, others)
    loaded.save_pretrained(tmp_path / "again")
    again = YocoUForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.config.architecture == arch
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(again.generate(ids, **call), generated)
    assert again.config.num_hidden_layers == arch.with_loops(loops).unrolled_layers
    assert Engine(again, None, EngineSettings(dtype="float32", cache_tokens=512)).num_loops == arch.with_loops(loops).num_loops

    model.generation_config.num_loops = loops
    assert torch.equal(model.generate(ids, **call), generated)
    model.save_pretrained(tmp_path / "generating")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "generating").eval().generate(ids, **call), generated)


@pytest.mark.parametrize("loops", [0, -1, 2.5, "3", True])
def test_an_impossible_loop_count_is_refused(loops: Any, tmp_path: Path) -> None:
    build(architecture()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="num_loops is"):
        YocoUForCausalLM.from_pretrained(tmp_path, num_loops=loops)


def test_misspelt_settings_are_refused(tmp_path: Path) -> None:
    model, ids = build(architecture(), pad_token_id=0), tokens(1, N).clamp(min=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="did you mean num_loops"):
        model.generate(ids, GenerationConfig(num_loop=1), max_new_tokens=1)
    with pytest.raises(ValueError, match="num_loop"):
        model.generate(ids, num_loop=1, max_new_tokens=1)
    for cls in (YocoUForCausalLM, YocoUModel, AutoModelForCausalLM):
        with pytest.raises(UserError, match="'num_loop'; did you mean num_loops"):
            cls.from_pretrained(tmp_path, num_loop=5)
    for load in (AutoConfig, YocoUConfig):
        with pytest.raises(UserError, match="'num_loop'; did you mean num_loops"):
            load.from_pretrained(tmp_path, num_loop=5)
    for build_from in (AutoModelForCausalLM.from_config, YocoUForCausalLM):
        with pytest.raises(UserError, match="num_loops came beside a config"):
            build_from(model.config, num_loops=5)
    for wrong in ({"windw": 4}, {"rope_thetas": 1e4}, {"expert": EXPERTS}, {"num_loop": 2}):
        with pytest.raises(UserError, match="did you mean"):
            YocoUConfig(**wrong)
    assert YocoUConfig(num_labels=3, torch_dtype="float32", transformers_version="4.0", note="mine").note == "mine"


def test_losses_that_read_the_heads_weight_are_refused_where_it_is_wrapped() -> None:
    wrapped = peft.get_peft_model(build(architecture()), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    ids = tokens(2, N)
    targets = SoftTargets(ids[..., None], torch.zeros(2, N, 1), 1.0)
    for call in ({"soft_targets": targets, "return_logits": False}, {"early_exit": EarlyExit(1, 1.0), "use_cache": False}):
        with pytest.raises(UserError, match="soft_targets and early_exit read the weight of lm_head alone"):
            wrapped(ids, labels=ids, **call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(({"cache_implementation": name}, f"cache_implementation is '{name}'") for name in ("static", "quantized", "paged")),
        ({"assistant_early_exit": 1}, "assistant_early_exit cuts a model by its layers"),
        ({"guidance_scale": 1.5, "num_loops": 1}, "guidance_scale runs a second pass"),
    ],
    ids=str,
)
def test_ways_to_generate_that_our_models_do_not_follow_are_refused(call: dict[str, Any], message: str) -> None:
    ids = tokens(1, N).clamp(min=1)
    for by_config in (False, True):
        settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, **(call if by_config else {}))
        with pytest.raises(UserError, match=message) as error:
            plain().generate(ids, settings, **({} if by_config else call))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"use yoco_u\.LLM"):
        plain().generate_batch([ids[0].tolist()], settings)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaling_of_rope_under_the_names_of_other_families_is_refused(key: str, tmp_path: Path) -> None:
    build(architecture()).save_pretrained(tmp_path)
    for cls in (YocoUForCausalLM, AutoModelForCausalLM, AutoConfig):
        with pytest.raises(UserError, match=f"no (key|argument) '{key}'"):
            cls.from_pretrained(tmp_path, **{key: {"rope_type": "linear", "factor": 2.0}})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: {"rope_type": "linear", "factor": 2.0}}))
    with pytest.raises(UserError, match=f"no key '{key}'; set rotary_scaling"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: None}))
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_of_other_families_are_refused(tmp_path: Path) -> None:
    build(architecture()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no key 'num_hidden_layers'; set the layers of stages"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    """As programs write them that read and write `config.json`, such as jq."""
    model = build(architecture(rope_theta=500.0))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 500}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(1, N)).logits, model(tokens(1, N)).logits)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention"])
def test_other_implementations_of_attention_are_refused(name: str, tmp_path: Path) -> None:
    model = build(architecture())
    model.save_pretrained(tmp_path)
    refused = [
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
        lambda: model.set_attn_implementation(name),
    ]
    for call in refused:
        with pytest.raises(UserError, match=f"attn_implementation is '{name}'") as error:
            call()
        assert "\n" not in str(error.value)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa") is not None


def test_attentions_asked_for_elsewhere_are_refused(tmp_path: Path) -> None:
    model, ids = build(architecture(), pad_token_id=0), tokens(1, N).clamp(min=1)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"output_attentions|attn_implementation"):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)(ids)
