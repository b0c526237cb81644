"""What of a source is no floating-point number, or is quantized, is refused by name; floats of 8 bits alone are taken."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file, save_file

from yoco_u.conversion import read_source
from yoco_u.errors import UserError

NO_FLOATS = {torch.bool: "BOOL", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64"}


def cast(folder: Path, dtype: torch.dtype) -> str:
    """Write one tensor of the weights in another dtype, and return its name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    save_file(weights | {name: weights[name].to(dtype)}, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
def test_of_a_source(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path, "llama")
    name = cast(tmp_path, dtype)
    with pytest.raises(UserError, match=re.escape(f"model.safetensors: the tensor {name} has dtype {NO_FLOATS[dtype]}")):
        read_source(str(tmp_path))


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"quant_method": "fp8"}, {"quant_method": "of tomorrow"},
        {"load_in_8bit": True}, {},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_source_that_says_it_is_quantized(tmp_path: Path, said: dict[str, Any], dtype: torch.dtype) -> None:
    save(tmp_path, "llama")
    cast(tmp_path, dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    method = said.get("quant_method", "quantization_config")
    with pytest.raises(UserError, match=rf"config\.json: the weights are quantized \({method}\), .* GGUF"):
        read_source(str(tmp_path))
