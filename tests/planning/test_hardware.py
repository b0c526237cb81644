"""Hardware by name and by line."""

import pytest

from yoco_u.errors import UserError
from yoco_u.planning.hardware import GPUS, find_hardware


@pytest.mark.parametrize("name", GPUS)
def test_gpus(name: str) -> None:
    """FLOPs per byte of memory traffic are between 50 and 500, as they are of all GPUs of these years; float32 is slower."""
    gpu = find_hardware(name.upper(), "bfloat16")
    assert gpu.name == GPUS[name].name
    assert 50 < gpu.gemm / gpu.bandwidth < 500
    assert f"{gpu.memory / 1e9:.0f} GB" in gpu.name or "4090" in gpu.name or "3090" in gpu.name
    assert find_hardware(name, "float32").gemm < gpu.gemm


def test_h100() -> None:
    h100 = find_hardware("h100", "bfloat16")
    assert (h100.memory, h100.gemm, h100.bandwidth) == (80e9, 989.4e12, 3350e9)


@pytest.mark.parametrize(
    ("line", "memory"),
    [
        ("memory=24GiB,gemm=900e9,bandwidth=46e9", 24 * 2**30),
        ("bandwidth = 46GB, memory = 24GB, gemm = 900000000000", 24e9),
        ("memory=0.5TiB,gemm=9e11,bandwidth=46000000000.0", 2**39),
    ],
)
def test_lines(line: str, memory: float) -> None:
    hardware = find_hardware(line, "bfloat16")
    assert (hardware.memory, hardware.gemm, hardware.bandwidth) == (memory, 900e9, 46e9)
    again = find_hardware(hardware.line, "float32")
    assert (again.memory, again.gemm, again.bandwidth) == (memory, 900e9, 46e9)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("h10", "did you mean h100?"),
        ("abacus", "known are h100"),
        ("", "known are h100"),
        ("memory=24GiB,gemm=900e9", "bandwidth is missing"),
        ("memory=24GiB,gemm=900e9,bandwith=46e9", "did you mean bandwidth?"),
        ("memory=-24e9,gemm=900e9,bandwidth=46e9", "memory: '-24e9' is out of range; expected 1 to 1e30"),
        ("memory=-24GiB,gemm=900e9,bandwidth=46e9", "'-24GiB' is no amount"),
        ("memory=0,gemm=900e9,bandwidth=46e9", "expected 1 to 1e30"),
        ("memory=nan,gemm=900e9,bandwidth=46e9", "expected 1 to 1e30"),
        ("memory=24GiB,gemm=inf,bandwidth=46e9", "gemm: 'inf' is out of range"),
        ("memory=24GiB,gemm=1, memory =8GiB,bandwidth=1", "memory is given 2 times; keep one of them"),
        ("memory=24GiB,gemm=,bandwidth=46e9", "gemm: '' is no amount"),
        ("memory=24 apples,gemm=1,bandwidth=1", "'24 apples' is no amount"),
    ],
)
def test_mistakes(text: str, part: str) -> None:
    with pytest.raises(UserError) as raised:
        find_hardware(text, "bfloat16")
    assert part in str(raised.value)
