"""Rates against the paper's measurements, and with one limit at a time; what fits against one sequence or token more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoco_u import Architecture, Stage
from yoco_u.architecture import STAGES, preset
from yoco_u.budget import decode_bytes, decode_flops, kv_bytes, parameters, prefill_bytes, prefill_flops, training_flops
from yoco_u.paper import DECODE_TOKENS_PER_SECOND as DECODE
from yoco_u.paper import PREFILL_TOKENS_PER_SECOND as PREFILL
from yoco_u.planning.hardware import Hardware, find_hardware
from yoco_u.planning.roofline import decode_rate, largest_batch, largest_context, prefill_rate, training_rate

H100 = find_hardware("h100", "bfloat16")


@pytest.mark.parametrize("context", sorted(PREFILL.keys() | DECODE.keys()))
def test_nothing_that_the_paper_measured_on_an_h100_is_faster(context: int) -> None:
    for name, measured in PREFILL[context].items():
        bound = prefill_rate(preset(name, "1.3b"), H100, context, 2, 2)
        assert bound.bound == "compute"
        assert 0.1 * bound.tokens_per_second < measured < bound.tokens_per_second
    for name, measured in DECODE[context].items():
        bound = decode_rate(preset(name, "1.3b"), H100, context, 32, 2, 2)
        assert bound.bound == "memory"
        assert 0.1 * bound.tokens_per_second < measured < bound.tokens_per_second


def test_the_longer_the_context_the_nearer_is_the_papers_gain() -> None:
    """At 256K attention is nearly all of the work, and the ratio of YOCO-U's bound to the Transformer's is near the paper's."""
    for measured, rate in (
        (PREFILL, lambda a: prefill_rate(a, H100, 262144, 2, 2)),
        (DECODE, lambda a: decode_rate(a, H100, 262144, 32, 2, 2)),
    ):
        ratio = rate(preset("yoco_u", "1.3b")).tokens_per_second / rate(preset("transformer", "1.3b")).tokens_per_second
        paper = measured[262144]["yoco_u"] / measured[262144]["transformer"]
        assert ratio == pytest.approx(paper, rel=0.5)


@pytest.mark.parametrize("name", STAGES)
def test_each_limit_alone(name: str) -> None:
    a = preset(name, "8m")
    slow_products = Hardware(name="", memory=1e9, gemm=1e3, bandwidth=1e15)
    slow_memory = Hardware(name="", memory=1e9, gemm=1e15, bandwidth=1e3)
    assert prefill_rate(a, slow_products, 300, 2, 2) == (pytest.approx(300 * 1e3 / prefill_flops(a, 300)), "compute")
    assert prefill_rate(a, slow_memory, 300, 2, 4) == (pytest.approx(300 * 1e3 / prefill_bytes(a, 300, 2, 4)), "memory")
    assert decode_rate(a, slow_products, 300, 5, 2, 2) == (pytest.approx(1e3 / decode_flops(a, 300)), "compute")
    assert decode_rate(a, slow_memory, 300, 5, 4, 2) == (pytest.approx(5e3 / decode_bytes(a, 300, 5, 4, 2)), "memory")
    assert training_rate(a, slow_products, 300) == pytest.approx(1e3 / training_flops(a, 300))


@given(
    name=st.sampled_from(sorted(STAGES)),
    context=st.integers(1, 5000),
    batch=st.integers(1, 40),
    room=st.integers(0, 2**31) | st.integers(0, 10**30),
)
def test_the_largest_fits_and_one_more_does_not(name: str, context: int, batch: int, room: int) -> None:
    a = preset(name, "8m")
    many = largest_batch(a, context, room, 2)
    assert many * kv_bytes(a, context) <= room < (many + 1) * kv_bytes(a, context)
    longest = largest_context(a, batch, room, 2)
    assert longest is not None
    assert longest == 0 or batch * kv_bytes(a, longest) <= room
    assert room < batch * kv_bytes(a, longest + 1)


def test_no_room_beside_the_weights() -> None:
    a = preset("yoco_u", "8m")
    room = -2.0 * parameters(a).total
    assert largest_batch(a, 100, room, 2) == 0
    assert largest_context(a, 1, room, 2) == 0


@pytest.mark.parametrize("attention", ["sliding", "retention"])
def test_what_keeps_no_growing_cache_has_no_longest_context(attention: str) -> None:
    settings = preset("yoco_u", "test").model_dump() | {"window": 8 if attention == "sliding" else None}
    a = Architecture(**settings | {"stages": (Stage(attention=attention, layers=2),)})
    assert largest_context(a, 4, 4 * kv_bytes(a, 100), 2) is None
    assert largest_context(a, 4, 4 * kv_bytes(a, 100) - 1, 2) == 0
