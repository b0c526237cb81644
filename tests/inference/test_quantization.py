"""Packed and int8 weights: the kernel against float64, layers and whole engines against the same weights dequantized."""

import copy
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_runs import VARIANTS, greedy, model, output, prompt, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from yoco_u import YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings
from yoco_u.inference.kernels import compiled
from yoco_u.inference.packing import PackedLinear, can_pack, pack
from yoco_u.inference.quantization import is_int8, quantize

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
        assert_products(PackedLinear([weight])(x), x, weight)


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
    found = PackedLinear([weight])(x)
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
            assert_products(PackedLinear([weight])(x), x, weight)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHTS)
def test_layers_of_the_same_input_run_as_one(kind: str) -> None:
    weights = [WEIGHTS[kind](outputs, 96, seed=outputs) for outputs in (70, 1, 33)]
    x = torch.randn(1, 9, 96).bfloat16()
    for found, weight in zip(PackedLinear(weights).split(x), weights, strict=True):
        assert_products(found, x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_the_nearest_of_255_steps(dtype: torch.dtype) -> None:
    layer = nn.Linear(300, 40, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight[3] = 0
    before = layer.weight.detach().clone().double()
    quantize(nn.Sequential(layer))
    step = before.abs().amax(1, keepdim=True) / 127
    found = layer.weight.qdata.double() * layer.weight.scale.double()
    assert layer.weight.qdata.dtype == torch.int8
    assert layer.weight.scale.dtype == torch.float32
    assert ((found - before).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("variant", ["yoco_u", "experts", "gated", "parscale", "four kinds", "one key-value head, tied"])
def test_what_is_quantized(variant: str) -> None:
    """All linear layers and the LM head; nothing else. A weight takes a byte, an output four more."""
    before = model(variant)
    after = copy.deepcopy(before)
    quantize(after)
    assert is_int8(after.lm_head.weight)
    originals = dict(before.named_parameters(remove_duplicate=False))
    for name, weight in after.named_parameters(remove_duplicate=False):
        stays = any(part in name for part in ("embed_tokens", "norm", "router", "prefix", "gates"))
        stays |= weight.ndim == 3  # experts
        assert is_int8(weight) != stays, name
        if stays:
            torch.testing.assert_close(weight, originals[name], rtol=0, atol=0)
        else:
            assert weight.qdata.nbytes == originals[name].numel()
            assert weight.scale.nbytes == 4 * len(originals[name])


def dequantized(quantized: YocoUForCausalLM, dtype: torch.dtype) -> YocoUForCausalLM:
    """The same numbers in plain tensors."""
    plain = copy.deepcopy(quantized)
    for module in plain.modules():
        if isinstance(module, nn.Linear) and is_int8(module.weight):
            weight = module.weight.qdata.double() * module.weight.scale.double()
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return plain


@pytest.mark.parametrize("variant", VARIANTS)
def test_engines_run_every_architecture_on_torchaos_tensors(variant: str) -> None:
    """In float32, token for token what plain layers with the dequantized weights generate."""
    settings = {"dtype": "float32", "cache_tokens": 256, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 16}
    prompts = [prompt(length, seed=length) for length in (1, 9, 21)]
    engine = Engine(copy.deepcopy(model(variant)), None, EngineSettings(weights="int8", **settings))
    assert is_int8(engine.runner.model.lm_head.weight)
    plain = Engine(dequantized(engine.runner.model, torch.float32), None, EngineSettings(**settings))
    found, expected = (run(one, prompts, greedy()) for one in (engine, plain))
    assert [output(request) for request in found] == [output(request) for request in expected]


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_engines_run_every_architecture_on_the_kernel(variant: str) -> None:
    """In bfloat16. A prompt's log-probabilities are as near to float32 ones of the dequantized weights as torchao's own are.

    By the median, since rounding sends some tokens to another expert, with int8 weights or without.
    """
    quantized = copy.deepcopy(model(variant)).bfloat16()
    quantize(quantized)
    ids = prompt(40)
    row = torch.tensor([ids])
    with torch.no_grad():
        truth = dequantized(quantized, torch.float32).float()(row).logits[0].log_softmax(-1)
        plain = quantized(row).logits[0].float().log_softmax(-1)
    settings = EngineSettings(dtype="bfloat16", weights="int8", cache_tokens=256, block_size=4, max_batched_tokens=16)
    engine = Engine(copy.deepcopy(model(variant)), None, settings)
    assert can_pack(quantized)
    assert isinstance(engine.runner.model.lm_head, PackedLinear)
    [request] = run(engine, [ids], greedy(prompt_logprobs=0))
    assert request.prompt_logprobs is not None
    found = torch.tensor([one.chosen.logprob for one in request.prompt_logprobs[1:] if one is not None])
    targets = row[0, 1:, None]
    error = (found - truth[:-1].gather(-1, targets)[:, 0]).abs()
    allowed = (plain - truth)[:-1].gather(-1, targets)[:, 0].abs()
    assert error.median() <= 1.5 * allowed.median() + 0.005
    assert len(output(request)) == 12


@needs_kernels
def test_packed_weights_take_a_byte_each() -> None:
    whole = copy.deepcopy(model("yoco_u")).bfloat16()
    quantize(whole)
    weights = sum(m.weight.numel() for m in whole.modules() if isinstance(m, nn.Linear))
    outputs = sum(len(m.weight) for m in whole.modules() if isinstance(m, nn.Linear))
    pack(whole)
    packed = {module for module in whole.modules() if isinstance(module, PackedLinear)}
    filling = sum((-sum(module.sizes) % 64) * (module.packed.shape[1] * 2 + 4) for module in packed)
    assert (
        sum(module.packed.nbytes + module.scales.nbytes for module in packed if module.scales is not None)
        == weights + 4 * outputs + filling
    )
    assert not any(isinstance(module, nn.Linear) for module in whole.modules())


def test_missing_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"^int8 weights need torchao: pip install 'yoco-u\[quantization\]'$"):
        Engine(copy.deepcopy(model("yoco_u")), None, EngineSettings(weights="int8", cache_tokens=64))


def test_torchao_beside_us_is_quiet() -> None:
    """transformers imports it, and it would warn of what it lacks for GPUs."""
    done = subprocess.run([sys.executable, "-c", "import yoco_u"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
