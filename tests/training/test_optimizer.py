"""The learning rate of every step, and the parameters that weight decay applies to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import preset
from yoco_u.config import parse
from yoco_u.errors import UserError
from yoco_u.training import OptimizerConfig, RunConfig
from yoco_u.training.optimizer import build_optimizer, learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 1.0, **settings})
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_cosine_rises_to_the_peak_and_falls_to_the_final_rate() -> None:
    found = rates(14, schedule="cosine", warmup_steps=4, final_learning_rate=0.1)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[8] == pytest.approx(0.55)  # half way
    assert found[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 10)) / 2)
    assert found[-1] == pytest.approx(0.1)


def test_wsd_is_stable_and_then_falls_linearly() -> None:
    found = rates(20, schedule="wsd", warmup_steps=2, decay_fraction=0.25, final_learning_rate=0.0)
    assert found == pytest.approx([0.5] + [1.0] * 14 + [0.8, 0.6, 0.4, 0.2, 0.0])


@given(
    steps=st.integers(1, 60), warmup=st.integers(0, 20), schedule=st.sampled_from(["cosine", "wsd"]),
    fraction=st.floats(0.05, 0.5), final=st.floats(0, 1),
)  # fmt: skip
def test_rates_rise_then_fall_and_end_at_the_final_rate(
    steps: int, warmup: int, schedule: str, fraction: float, final: float
) -> None:
    config = OptimizerConfig.model_validate(
        {"warmup_steps": warmup, "schedule": schedule, "final_learning_rate": final}
        | ({"decay_fraction": fraction} if schedule == "wsd" else {})
    )
    if warmup + config.decay_steps(steps) > steps:
        return
    found = [rate / config.learning_rate for rate in (learning_rate(config, step, steps) for step in range(steps))]
    assert found[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(a >= b - 1e-12 for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))
    assert found[-1] == pytest.approx(final)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    data = {
        "name": "n", "architecture": {"preset": "yoco_u", "size": "test"}, "dataset": "d",
        "optimizer": {"warmup_steps": 10}, "training": {"steps": 10},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"warmup_steps is 10, but at most 9 fit into training.steps 10 beside 1 step of decay"):
        parse(RunConfig, data, "run.yaml")
    data |= {"optimizer": {"warmup_steps": 0}, "training": {"steps": 10, "checkpoint_stages": [2]}}
    with pytest.raises(UserError, match="checkpoint_stages names stage 2; the model's are 0 to 1"):
        parse(RunConfig, data, "run.yaml")


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_that_multiply_activations_decay(tied: bool) -> None:
    names = set()
    for name, settings in (
        ("yoco_u", {"loop_gate": 0.5, "qk_norm": True}),
        ("parscale", {}),
        ("yoco", {"experts": {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 8}}),
    ):
        config = YocoUConfig.from_architecture(preset(name, "test", tie_word_embeddings=tied, **settings))
        model = YocoUForCausalLM(config)
        optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay.keys() == {id(p) for p in model.parameters()}
        names |= {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    kinds = {name.rpartition("layers.")[2].lstrip("0123456789.") for name in names}
    assert kinds == {
        "model.embed_tokens.weight", "model.norm.weight", "model.global_kv.norm.weight", "model.global_kv.k_norm.weight",
        "attn_norm.weight", "mlp_norm.weight", "attn.q_norm.weight", "attn.k_norm.weight",
        "attn.prefix_keys", "attn.prefix_values", "model.stages.0.loop_gates",
    }  # fmt: skip
