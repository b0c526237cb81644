"""RoPE scaling against transformers' own functions."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import architecture, build, tokens
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from yoco_u.architecture import Architecture, RotaryScaling, preset
from yoco_u.config import parse
from yoco_u.errors import UserError
from yoco_u.model.rope import rotary_angles

THEIRS = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}


@given(
    kind=st.sampled_from(sorted(THEIRS)), head_dim=st.sampled_from([2, 8, 64, 128]), theta=st.sampled_from([100.0, 1e4, 5e5]),
    factor=st.floats(1, 40), original=st.integers(8, 100_000), low=st.floats(0.5, 3), high=st.floats(4, 40),
    truncate=st.booleans(), attention_factor=st.floats(0.5, 2),
)  # fmt: skip
def test_scaling(
    kind: Any, head_dim: int, theta: float, factor: float, original: int, low: float, high: float, truncate: bool,
    attention_factor: float,
) -> None:  # fmt: skip
    given_to_all = {"rope_type": kind, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    theirs = given_to_all | dict(zip(THEIRS[kind], (low, high), strict=False))
    theirs |= {"truncate": truncate, "attention_factor": attention_factor}
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=theirs)
    expected, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    more = {} if kind == "linear" else {"original_length": original, "low_turns": low, "high_turns": high}
    more |= {"truncate": truncate, "attention_factor": attention_factor} if kind == "yarn" else {}
    positions = torch.tensor([[0, 1, 17, 300]])
    cos, sin = rotary_angles(positions, head_dim, theta, RotaryScaling(type=kind, factor=factor, **more))
    angles = positions[..., None].double() * expected.double()
    torch.testing.assert_close(cos[0, :, 0, : head_dim // 2].double(), angles[0].cos() * scale, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(sin[0, :, 0, : head_dim // 2].double(), angles[0].sin() * scale, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "dynamic", "factor": 2}, "type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0}, "factor"),
        ({"type": "linear", "factor": 2, "original_length": 8}, "original_length is 8"),
        ({"type": "yarn", "factor": 2}, "original_length is None"),
        ({"type": "llama3", "factor": 2, "original_length": 8, "low_turns": 5}, "high_turns 4.0 is not above low_turns 5.0"),
    ],
)
def test_impossible_scalings(scaling: dict[str, Any], said: str) -> None:
    plain = preset("yoco_u", "test").model_dump()
    with pytest.raises(UserError, match=said):
        parse(Architecture, plain | {"rotary_scaling": scaling}, "x")


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_rotation_of_the_cross_decoder_alone(kept: int) -> None:
    """With a window of one key, only the cross-decoder's positions matter: slower rotation is that of a linear scaling."""
    settings = {"window": 1, "rope_cross": True, "global_kvs": 2}
    ids = tokens(2, 30)
    with torch.no_grad():
        faded = build(architecture("yoco", **settings))
        whole = faded(ids, logits_to_keep=kept).logits
        for share, other in ((0.25, {"rotary_scaling": {"type": "linear", "factor": 4.0}}), (0.0, {"rope_cross": False})):
            faded.model.cross_rotation = share
            found = faded(ids, logits_to_keep=kept).logits
            expected = build(architecture("yoco", **settings | other))(ids, logits_to_keep=kept).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found, whole, atol=1e-2)


def test_a_share_goes_from_nothing_to_the_whole() -> None:
    """Rotation and YaRN's scale together, so that positions that fade out end where there are none."""
    scaling = RotaryScaling(type="yarn", factor=4.0, original_length=32, attention_factor=1.14)
    positions = torch.tensor([[0, 1, 17, 300]])
    whole = torch.complex(*rotary_angles(positions, 8, 100.0, scaling))
    found = [torch.complex(*rotary_angles(positions, 8, 100.0, scaling, share)) for share in (0.0, 0.25, 1.0)]
    assert torch.equal(found[0], torch.ones_like(whole)) and torch.equal(found[2], whole)
    torch.testing.assert_close(found[1].abs(), torch.full_like(whole.abs(), 1.035))
    torch.testing.assert_close((found[1] / 1.035) ** 4, whole / 1.14, rtol=1e-4, atol=1e-4)
