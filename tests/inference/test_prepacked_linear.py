"""Matrix products of prepacked bfloat16 and int8 weights, against float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from yoco_u.inference.kernels.cpu import compiled
from yoco_u.inference.prepacking import PrepackedLinear
from yoco_u.model.quantization import is_int8

needs_kernels = pytest.mark.skipif(not compiled(), reason="needs a C++ compiler")


def int8_weight(outputs: int, inputs: int, seed: int = 0) -> Any:
    """Every int8 value, scales of very different sizes; stands in for torchao's tensor."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    return SimpleNamespace(qdata=whole, scale=torch.randn(outputs, 1, generator=generator).exp())


def bfloat16_weight(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()


WEIGHTS: dict[str, Callable[..., Any]] = {"int8": int8_weight, "bfloat16": bfloat16_weight}


def assert_products(found: Tensor, x: Tensor, weight: Any) -> None:
    """Those of float64, but for one rounding to bfloat16 and the order of float32 sums."""
    plain = weight.qdata.double() * weight.scale.double() if is_int8(weight) else weight.double()
    expected, terms = x.double() @ plain.T, x.double().abs() @ plain.abs().T
    assert found.shape == expected.shape
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * terms).all()


def check_kernel(tokens: int, inputs: int, outputs: int) -> None:
    x = torch.randn(tokens, inputs).bfloat16()
    for make in WEIGHTS.values():
        weight = make(outputs, inputs)
        assert_products(PrepackedLinear([weight])(x), x, weight)


@needs_kernels
@given(tokens=st.integers(1, 70), inputs=st.integers(1, 300), outputs=st.integers(1, 200))
def test_kernel_against_direct_products(tokens: int, inputs: int, outputs: int) -> None:
    check_kernel(tokens, inputs, outputs)


@needs_kernels
@pytest.mark.parametrize("tokens", [0, 1, 383, 384, 385, 800])
def test_kernel_of_many_tokens(tokens: int) -> None:
    check_kernel(tokens, 259, 65)


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHTS)
def test_nan_stays_with_its_token(kind: str) -> None:
    weight, x = WEIGHTS[kind](70, 40), torch.randn(9, 40).bfloat16()
    x[4, 20] = torch.nan
    found = PrepackedLinear([weight])(x)
    assert found[4].isnan().all()
    others = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    assert_products(found[others], x[others], weight)


@needs_kernels
def test_kernel_over_threads_and_leading_dimensions() -> None:
    x = torch.randn(2, 3, 5, 260).bfloat16()[..., ::2]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for make in WEIGHTS.values():
            weight = make(700, 130)
            assert_products(PrepackedLinear([weight])(x), x, weight)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHTS)
def test_layers_of_the_same_input_run_as_one(kind: str) -> None:
    weights = [WEIGHTS[kind](outputs, 96, seed=outputs) for outputs in (70, 1, 33)]
    x = torch.randn(1, 9, 96).bfloat16()
    for found, weight in zip(PrepackedLinear(weights).split(x), weights, strict=True):
        assert_products(found, x, weight)
