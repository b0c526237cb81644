"""int8 weights: layers and whole engines against the same weights dequantized."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from engine_runs import NEW, VARIANTS, greedy, model, output, prompt, run
from torch import nn

from yoco_u import YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.inference import Engine, EngineSettings
from yoco_u.inference.kernels.cpu import compiled
from yoco_u.inference.prepacking import PrepackedLinear, can_prepack, prepack
from yoco_u.model.quantization import is_int8, quantize

needs_kernels = pytest.mark.skipif(not compiled(), reason="needs a C++ compiler")


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


@pytest.mark.parametrize("inputs", [96, 88, 10])
def test_in_int4_groups_of_weights_are_rounded_to_the_nearest_of_15_steps(inputs: int) -> None:
    layer = nn.Linear(inputs, 40, bias=False)
    before = layer.weight.detach().clone()
    quantize(nn.Sequential(layer, nn.Linear(40, 3)), "int4")
    found = layer(torch.eye(inputs)).T
    groups = [weights.reshape(40, -1, math.gcd(32, inputs)) for weights in (before, found)]
    step = groups[0].abs().amax(2, keepdim=True) / 7.5
    assert ((groups[1] - groups[0]).abs() <= 0.51 * step).all()
    assert (found.reshape(40, -1)[0].unique().numel()) <= 16 * (inputs // math.gcd(32, inputs))


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
    found, expected = (run(one, prompts, greedy(max_tokens=4)) for one in (engine, plain))
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
    assert can_prepack(quantized)
    assert isinstance(engine.runner.model.lm_head, PrepackedLinear)
    [request] = run(engine, [ids], greedy(prompt_logprobs=0))
    assert request.prompt_logprobs is not None
    found = torch.tensor([one.chosen.logprob for one in request.prompt_logprobs[1:] if one is not None])
    targets = row[0, 1:, None]
    error = (found - truth[:-1].gather(-1, targets)[:, 0]).abs()
    allowed = (plain - truth)[:-1].gather(-1, targets)[:, 0].abs()
    assert error.median() <= 1.5 * allowed.median() + 0.005
    assert len(output(request)) == NEW


@needs_kernels
def test_packed_weights_take_a_byte_each() -> None:
    whole = copy.deepcopy(model("yoco_u")).bfloat16()
    quantize(whole)
    weights = sum(m.weight.numel() for m in whole.modules() if isinstance(m, nn.Linear))
    outputs = sum(len(m.weight) for m in whole.modules() if isinstance(m, nn.Linear))
    prepack(whole)
    prepacked = {module for module in whole.modules() if isinstance(module, PrepackedLinear)}
    filling = sum((-sum(module.sizes) % 64) * (module.prepacked.shape[1] * 2 + 4) for module in prepacked)
    assert (
        sum(module.prepacked.nbytes + module.scales.nbytes for module in prepacked if module.scales is not None)
        == weights + 4 * outputs + filling
    )
    assert not any(isinstance(module, nn.Linear) for module in whole.modules())


def test_missing_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"^quantized weights need torchao: pip install 'yoco-u\[quantization\]'$"):
        Engine(copy.deepcopy(model("yoco_u")), None, EngineSettings(weights="int8", cache_tokens=64))


def test_torchao_beside_us_is_quiet() -> None:
    """transformers imports it, and it would warn of what it lacks for GPUs."""
    done = subprocess.run([sys.executable, "-c", "import yoco_u"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
