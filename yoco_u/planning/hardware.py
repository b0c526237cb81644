"""A machine as a plan sees it: how much memory it has, and how fast it multiplies and reads. Common GPUs are known by name."""

from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, ByteSize, TypeAdapter, ValidationError

from yoco_u.config import Config, did_you_mean, parse, shown, split_settings
from yoco_u.errors import UserError

DType = Literal["bfloat16", "float32"]

THIS = "this"
"""The name that `--hardware` takes for the machine that the command runs on."""


def _amount(value: object) -> object:
    """A number as it is; a text such as 900e9, 24GiB or 80GB as the number that it says."""
    if isinstance(value, str) and not value.isascii():
        raise ValueError(f"{shown(value)} is no amount; write it in the digits 0 to 9, such as 900e9 or 24GiB")
    try:
        amount = float(value) if isinstance(value, str) else value
    except ValueError:
        try:
            amount = TypeAdapter(ByteSize).validate_python(value)
        except (ValidationError, OverflowError):
            raise ValueError(
                f"{shown(value)} is no amount; expected a number with or without a unit, such as 900e9 or 24GiB"
            ) from None
    if isinstance(amount, (int, float)) and not 1 <= amount <= 1e30:
        raise ValueError(f"{shown(value)} is out of range; expected 1 to 1e30")
    return amount


_Amount = Annotated[float, BeforeValidator(_amount)]


class Hardware(Config):
    """One device.

    Attributes:
        memory: its size in bytes.
        gemm: FLOP/s of matrix products, in the dtype that is planned for.
        bandwidth: bytes per second that it reads from its memory.
    """

    name: str
    memory: _Amount
    gemm: _Amount
    bandwidth: _Amount

    @property
    def line(self) -> str:
        """The three figures as text, from which `find_hardware` makes the same hardware again."""
        return f"memory={self.memory:.0f},gemm={self.gemm:.4g},bandwidth={self.bandwidth:.4g}"


class Gpu(NamedTuple):
    """A GPU by the figures of its data sheet.

    Attributes:
        memory: GB, of 10^9 bytes each.
        bfloat16: TFLOP/s of dense matrix products that accumulate in float32; no structured sparsity.
        float32: TFLOP/s of products that are float32 throughout; no TF32.
        bandwidth: GB/s of its memory.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float


GPUS = {
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 80, 989.4, 66.9, 3350),
    "h100-pcie": Gpu("NVIDIA H100 PCIe 80 GB", 80, 756, 51.2, 2000),
    "h200": Gpu("NVIDIA H200 SXM 141 GB", 141, 989.4, 66.9, 4800),
    "b200": Gpu("NVIDIA B200 SXM 180 GB", 180, 2250, 80, 8000),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 80, 312, 19.5, 2039),
    "a100-40gb": Gpu("NVIDIA A100 SXM 40 GB", 40, 312, 19.5, 1555),
    "l40s": Gpu("NVIDIA L40S 48 GB", 48, 362, 91.6, 864),
    "l4": Gpu("NVIDIA L4 24 GB", 24, 121, 30.3, 300),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090 24 GB", 24, 165.2, 82.6, 1008),
    "rtx-3090": Gpu("NVIDIA GeForce RTX 3090 24 GB", 24, 71, 35.6, 936),
    "mi300x": Gpu("AMD Instinct MI300X 192 GB", 192, 1307.4, 163.4, 5300),
    "mi325x": Gpu("AMD Instinct MI325X 256 GB", 256, 1307.4, 163.4, 6000),
}
"""GPUs by the names that `--hardware` takes."""


def find_hardware(text: str, dtype: DType | Literal["auto"]) -> Hardware:
    """The hardware that a text describes: a name in `GPUS`, or a line such as `memory=24GiB,gemm=900e9,bandwidth=46e9`.

    Args:
        dtype: chooses which of a GPU's rates counts, all of which multiply bfloat16; a line gives the rate itself.

    Raises:
        UserError: if the name is unknown, with the nearest known one, or if the line lacks one of the three figures.
    """
    if "=" in text:
        pairs = [part.partition("=") for part in split_settings(text)]
        given = {key.strip(): value.strip() for key, _, value in pairs}
        return parse(Hardware, {"name": text} | given, f"hardware {text!r}")
    gpu = GPUS.get(text.lower())
    if gpu is None:
        hint = did_you_mean(text.lower(), GPUS, f"known are {', '.join(GPUS)} and {THIS}")
        raise UserError(f"unknown hardware {text!r}: {hint}; or give a line such as memory=24GiB,gemm=900e9,bandwidth=46e9")
    gemm = gpu.float32 if dtype == "float32" else gpu.bfloat16
    return Hardware(name=gpu.name, memory=gpu.memory * 1e9, gemm=gemm * 1e12, bandwidth=gpu.bandwidth * 1e9)
