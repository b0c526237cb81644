"""Many small arrays for the device in one copy: a copy costs a GPU some microseconds, whatever its size."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yoco_u.device import upload

_ALIGNED = 16  # bytes; kernels are compiled anew for pointers that are aligned less well
_DTYPES = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}

Arrays = Mapping[str, NDArray[Any]]


def upload_arrays(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """Copy arrays of bool, int32, int64, float32 or float64 to a device, under the same names; on a CPU they are shared."""
    if not arrays or device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    return _views(upload(_packed(arrays), device), arrays)


class StaticArrays:
    """Arrays whose places on the device never change, as CUDA graphs need them.

    Args:
        arrays: first values, which set the shapes and dtypes for good.

    Attributes:
        tensors: the arrays on the device, by name.
    """

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        self._bytes = upload(_packed(arrays), device)
        self.tensors = _views(self._bytes, arrays)

    def write(self, arrays: Arrays) -> None:
        """Replace all values."""
        self._bytes.copy_(upload(_packed(arrays), self._bytes.device))


def _packed(arrays: Arrays) -> NDArray[np.uint8]:
    parts = [np.zeros(_ALIGNED, np.uint8)]  # torch cannot view no bytes at all as another dtype
    for array in arrays.values():
        parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8), np.zeros(-array.nbytes % _ALIGNED, np.uint8)]
    return np.concatenate(parts)


def _views(packed: Tensor, arrays: Arrays) -> dict[str, Tensor]:
    found, begin = {}, _ALIGNED
    for name, array in arrays.items():
        found[name] = packed[begin : begin + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        begin += array.nbytes + -array.nbytes % _ALIGNED
    return found
