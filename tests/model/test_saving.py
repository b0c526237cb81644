"""Weights: written and read back bit for bit, initialised once and as documented."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import covering
from models import EXPERTS, PRESETS, architecture, build, tokens
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from yoco_u import Architecture, YocoUConfig, YocoUForCausalLM, YocoUModel
from yoco_u.architecture import preset
from yoco_u.errors import UserError
from yoco_u.model.layers import ResidualLinear

ARCHITECTURES: dict[str, Architecture] = {
    **{name: architecture(name) for name in PRESETS},
    "tied": architecture("yoco_u", tie_word_embeddings=True, loop_gate=0.3, qk_norm=True),
    "experts": architecture("yoco_u", experts=EXPERTS),
}
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_known_everywhere(tied: bool, tmp_path: Path) -> None:
    model, ids = build(architecture("yoco_u", tie_word_embeddings=tied)), tokens(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(120)
    assert torch.equal(model(ids).logits[..., :96], before)
    model.save_pretrained(tmp_path)
    for one in (model, YocoUForCausalLM.from_pretrained(tmp_path)):
        assert (
            one.model.architecture
            == one.config.architecture
            == architecture("yoco_u", tie_word_embeddings=tied, vocab_size=120)
        )
        assert one.model.at_loops(2).vocab_size == one(ids).logits.shape[-1] == 120
    body = YocoUModel(YocoUConfig.from_architecture(architecture()))
    body.resize_token_embeddings(120)
    assert body.architecture.vocab_size == 120


@pytest.mark.parametrize(("name", "dtype"), covering(list(ARCHITECTURES), [torch.float32, torch.bfloat16]))
def test_saved_and_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    arch = ARCHITECTURES[name]
    model = build(arch, bos_token_id=3, eos_token_id=3).to(dtype)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert ("lm_head.weight" in stored) != arch.tie_word_embeddings
    assert {"config.json", "generation_config.json", "model.safetensors"} == {path.name for path in tmp_path.iterdir()}

    loaded, report = YocoUForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.architecture == arch
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == (torch.float32 if "choice_bias" in name else dtype)
        assert torch.equal(after[name], tensor), name
    if arch.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = tokens(2, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_dtype_is_kept_by_default(tmp_path: Path) -> None:
    build(architecture()).bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_auto_classes(tmp_path: Path) -> None:
    model = build(architecture("upper_loop", loops=4))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, YocoUConfig)
    assert config.architecture == model.config.architecture
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), YocoUForCausalLM)
    assert isinstance(AutoModelForCausalLM.from_config(config), YocoUForCausalLM)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, YocoUModel)
    ids = tokens(1, 9)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_sharded_files(tmp_path: Path) -> None:
    model = build(architecture("yoco_u", experts=EXPERTS))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = YocoUForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@every_architecture
def test_loading_initialises_nothing_again(arch: Architecture, tmp_path: Path) -> None:
    """Not even with the same outcome: no random number is drawn for a tensor that the checkpoint holds."""
    build(arch).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    YocoUForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_config_file_shows_the_architecture(tmp_path: Path) -> None:
    arch = architecture("yoco_u", loop_gate=0.3, experts=EXPERTS)
    YocoUConfig.from_architecture(arch).save_pretrained(tmp_path)
    shown = json.loads((tmp_path / "config.json").read_text())
    assert {name: shown[name] for name in Architecture.model_fields} == arch.model_dump(mode="json")
    assert "sliding_window" not in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"stages": [{"attention": "cross", "layers": 1}]}, "first stage is cross"),
        ({"stages": [{"attention": "sliding", "layer": 1}]}, "did you mean layers"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        YocoUConfig(**wrong)
    assert "\n" not in str(error.value)


# Initialisation


@every_architecture
def test_no_tensor_is_left_uninitialised(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is filled with NaN first, so that whatever is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(math.nan))
    model = YocoUForCausalLM(YocoUConfig.from_architecture(arch)).eval()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert model(tokens(2, 12)).logits.isfinite().all()


@pytest.mark.parametrize("arch", [ARCHITECTURES["parscale"], ARCHITECTURES["experts"]], ids=["parscale", "experts"])
def test_tensors_that_a_checkpoint_lacks_are_initialised(arch: Architecture, tmp_path: Path) -> None:
    """A plain transformer's weights loaded into ParScale, as its paper does: the new parts must not be whatever memory held."""
    plain = arch.model_copy(update={"parallel": None, "experts": None})
    build(plain).save_pretrained(tmp_path)
    config = YocoUConfig.from_architecture(arch)
    model = YocoUForCausalLM.from_pretrained(tmp_path, config=config)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if "prefix" in name or "gate_up_proj" in name:
            assert abs(tensor.std() * arch.hidden_size**0.5 - 1) < 0.2, name
    assert model(tokens(2, 12)).logits.isfinite().all()


@pytest.mark.parametrize("loops", [1, 3, 12])
def test_residual_projections_are_scaled_by_unrolled_depth(loops: int) -> None:
    settings = {"hidden_size": 128, "head_dim": 32, "vocab_size": 512, "layers": 4, "loops": loops}
    for experts in (None, EXPERTS | {"intermediate_size": 64}):
        width = {"experts": experts} if experts else {"intermediate_size": 256}
        arch = preset("yoco_u", "test", **settings, **width)
        model = YocoUForCausalLM(YocoUConfig.from_architecture(arch, initializer_range=0.05))
        depth = 2 * loops + 2
        assert arch.unrolled_layers == depth
        residual = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, ResidualLinear)}
        residual |= {n for n, _ in model.named_parameters() if n.endswith("mlp.down_proj")}
        assert len(residual) == 4 * (3 if experts else 2)
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2:
                assert (tensor == 1).all(), name
                continue
            expected = 0.05 / math.sqrt(2 * depth) if name in residual else 0.05
            assert abs(tensor.std() / expected - 1) < 0.1, name
            assert tensor.mean().abs() < 0.1 * expected, name


def test_gates_and_balance_start_where_they_should() -> None:
    model = YocoUForCausalLM(YocoUConfig.from_architecture(architecture("yoco_u", loops=4, loop_gate=0.25, experts=EXPERTS)))
    assert model.model.stages[0].loop_gates.tolist() == [0.25] * 3
    for name, tensor in model.named_buffers():
        assert (tensor == 0).all(), name


def test_the_same_seed_gives_the_same_model() -> None:
    config = YocoUConfig.from_architecture(architecture("yoco_u", experts=EXPERTS))
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(YocoUForCausalLM(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_fresh_model_predicts_nothing_in_particular() -> None:
    """Its logits are about standard normal (normed hidden states times a head of std 1 / sqrt(hidden)): log V + 1/2."""
    for name in PRESETS:
        arch = architecture(name)
        model = YocoUForCausalLM(YocoUConfig.from_architecture(arch))
        ids = tokens(4, 30)
        assert abs(model(ids, labels=ids).loss - math.log(arch.vocab_size) - 0.5) < 0.35, name
