"""GPUs that are missing or cannot do what is asked of them: one clear line each. Torch is made to say what it would there."""

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from models import EXPERTS, architecture, build

from yoco_u import device
from yoco_u.device import check_bfloat16, find_device
from yoco_u.errors import UserError
from yoco_u.inference import EngineSettings, model_limits, prepacking
from yoco_u.inference.kernels import gpu
from yoco_u.model.blocks import blocks_of
from yoco_u.training.parallelize import compile_model

CUDA = torch.device("cuda", 0)
OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update it."


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "cuba"])
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, device: Any) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check that you have an NVIDIA GPU.")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(UserError, match=r"cannot be used .*expected auto, cpu or a GPU of this machine") as found:
        find_device(name)
    assert "\n" not in str(found.value)


def test_auto_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def available() -> bool:
        warnings.warn(OLD_DRIVER + "\nMore lines.", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    assert find_device("auto").type == "cpu"
    assert capsys.readouterr().err == f"the GPU is not used: {OLD_DRIVER}\n"


def test_a_gpu_without_bfloat16(old_gpu: None) -> None:
    a = architecture("yoco_u")
    with pytest.raises(UserError, match=r"Tesla T4 has compute capability 7.5, but bfloat16 needs 8.0; set dtype float32"):
        EngineSettings(dtype="bfloat16").torch_dtype(a, CUDA)
    assert EngineSettings().torch_dtype(a, CUDA) == EngineSettings(dtype="float32").torch_dtype(a, CUDA) == torch.float32
    check_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_on_a_cpu_the_engine_multiplies_in_what_is_fast(
    multiplies: bool, built: bool, experts: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels multiply bfloat16 on any CPU; torch, which runs the rest and the experts, on some."""
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: multiplies)
    monkeypatch.setattr(prepacking, "compiled", lambda: built)
    found = EngineSettings().torch_dtype(architecture("yoco_u", experts=experts), torch.device("cpu"))
    assert (found == torch.bfloat16) == (multiplies or (built and experts is None))


def test_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how many tokens would fit: so many do, and a block more does not."""
    a = architecture("yoco_u")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**20))
    shape = EngineSettings(cache_tokens=10**6, dtype="float32").cache_shape(a, CUDA)
    with pytest.raises(UserError, match=r"need \d+ MiB, .* but 1 MiB are free; lower .*\((\d+) tokens would fit\)") as found:
        model_limits.check_memory(a, shape, 3, 0, CUDA)
    fit = int(str(found.value).rpartition("(")[2].partition(" ")[0])
    for tokens, fits in ((fit, True), (fit + 64, False)):
        shape = EngineSettings(cache_tokens=tokens, dtype="float32").cache_shape(a, CUDA)
        if fits:
            model_limits.check_memory(a, shape, 3, 0, CUDA)
        else:
            with pytest.raises(UserError, match="would fit"):
                model_limits.check_memory(a, shape, 3, 0, CUDA)


@pytest.mark.parametrize("lacks", ["Triton", "a C compiler"])
def test_a_gpu_without_triton_or_a_compiler(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says so in one line, and so does training that must compile; other training goes on without compiling."""

    def no_compiler(_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    if lacks == "Triton":
        monkeypatch.setattr(device, "find_spec", lambda name: None if name == "triton" else find_spec(name))
        expected = r"Triton is not installed; .*pip install 'yoco-u\[gpu\]'"
    else:
        driver = pytest.importorskip("triton.runtime").driver
        monkeypatch.setattr(type(driver), "active", property(no_compiler))
        expected = r"cannot launch kernels here \(.*Failed to find C compiler.*\); it needs a C compiler"
    monkeypatch.setattr(device, "what_triton_lacks", device.what_triton_lacks.__wrapped__)
    monkeypatch.setattr(gpu, "what_triton_lacks", device.what_triton_lacks)
    with pytest.raises(UserError, match=expected):
        gpu.start_triton()
    _check_training(CUDA, expected)


def test_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    _check_training(torch.device("cpu"), r"no C\+\+ compiler here")


def _check_training(device: torch.device, expected: str) -> None:
    model = build(architecture("yoco"))
    compile_model(model, "auto", device)
    assert all(block._compiled_call_impl is None for block in blocks_of(model))
    with pytest.raises(UserError, match=f"training.compile on cannot be had: .*{expected}"):
        compile_model(model, "on", device)
