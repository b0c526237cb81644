"""Triton's interpreter with bfloat16 as a GPU computes it; to be imported before the first kernel is launched.

The interpreter of Triton 3.6 keeps bfloat16 as whole numbers of 16 bits. Matrix products multiply these as they are, and casts
cut off what should be rounded. It also takes scalars from numpy in a way that numpy has given up. Only that is replaced here.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _patch_tensor = InterpreterBuilder.cast_impl, interpreter._patch_lang_tensor


def _wide(handle: Any) -> NDArray[Any]:
    """The values of a tensor, bfloat16 as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to bfloat16, as its bits."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _cast_bfloat16(self: InterpreterBuilder, source: Any, target: Any) -> Any:
    kinds = source.dtype.scalar, target.scalar
    if kinds[0] == kinds[1] or tl.bfloat16 not in kinds:
        return _cast(self, source, target)
    if kinds[1] == tl.bfloat16:
        return TensorHandle(_narrow(source.data.astype(np.float32)), tl.bfloat16)
    return TensorHandle(_wide(source).astype(interpreter._get_np_dtype(kinds[1])), kinds[1])


def _dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    return TensorHandle(np.matmul(_wide(a), _wide(b)) + d.data, d.dtype.scalar)


def _patch(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


InterpreterBuilder.cast_impl = _cast_bfloat16
InterpreterBuilder.create_dot = _dot
interpreter._patch_lang_tensor = _patch
