"""Weights that are no floating-point numbers are refused by file, tensor and dtype, and never cast."""

import re
from pathlib import Path

import pytest
import torch
from models import architecture, build
from safetensors.torch import load_file, save_file

from yoco_u.errors import UserError
from yoco_u.model.saving import check_weights

NO_FLOATS = {
    torch.bool: "BOOL", torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EIGHT_BITS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def cast(folder: Path, dtype: torch.dtype, number: int) -> str:
    """Write one tensor of the weights in another dtype, and return its name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[number % len(weights)]
    save_file(weights | {name: weights[name].to(dtype)}, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize("dtype", [*NO_FLOATS, *EIGHT_BITS], ids=str)
def test_of_a_saved_model(tmp_path: Path, dtype: torch.dtype, number: int) -> None:
    model = build(architecture("yoco_u"))
    model.save_pretrained(tmp_path)
    name, said = cast(tmp_path, dtype, number), (NO_FLOATS | EIGHT_BITS)[dtype]
    with pytest.raises(UserError, match=re.escape(f"model.safetensors: the tensor {name} has dtype {said}, expected one of")):
        check_weights(tmp_path, model.config)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_floats_of_a_saved_model_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build(architecture("yoco_u"))
    model.save_pretrained(tmp_path)
    cast(tmp_path, dtype, 0)
    check_weights(tmp_path, model.config)
