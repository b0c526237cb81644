"""Dry runs on torch's meta device, which has shapes and dtypes but no values, as a GPU that must not be waited for.

A tensor on this device cannot be read: `item()`, `tolist()`, `bool()`, `nonzero` and masks as indices raise by themselves. What
does not raise there but makes the host wait for a GPU, or puts a tensor in the wrong place, raises in `OnDevice`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoco_u.model import feed_forward, gpu_attention, layers, loss, modeling, segments
from yoco_u.training import forward, step, validation

META = torch.device("meta")
_COPIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_WATCHED = _COPIES | _MOVES | _INDEXING
_PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.__matmul__}


class HiddenCopyError(AssertionError):
    """Something was copied between host and device other than by `yoco_u.device.upload`, or made on the host."""


class _Calls(TorchFunctionMode):
    """Raises at calls that copy from the host. With `autocast`, products compute in bfloat16, as meta cannot by itself."""

    def __init__(self, run: "OnDevice") -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.run.strict and func in _WATCHED:
            leaves = tree_leaves((args, kwargs))
            to_device = any(str(leaf) == "meta" for leaf in leaves if isinstance(leaf, (str, torch.device)))
            on_device = any(leaf.is_meta for leaf in leaves if isinstance(leaf, Tensor))
            if func in _COPIES and (to_device or on_device) and not _is_empty(args[-1]):  # nothing is copied to an empty tensor
                raise HiddenCopyError(f"{func.__name__} onto the device")
            if func in _MOVES and (to_device or on_device) and _result_device(args, kwargs) != args[0].device:
                raise HiddenCopyError(f"{func.__name__} between host and device")
            if func in _INDEXING and args[0].is_meta and _holds_list(args[1]):
                raise HiddenCopyError("an index that is a list")
        if self.run.autocast and func in _PRODUCTS:
            args = tuple(a.bfloat16() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args)
        return func(*args, **kwargs)


class OnDevice(TorchDispatchMode):
    """Every operation works on tensors of the meta device alone.

    Args:
        host: whether operations on tensors of the host alone are allowed too, as for preparing a batch.

    Attributes:
        strict: whether it is on; `upload` and the optimizer switch it off.
        autocast: whether products compute in bfloat16.
    """

    def __init__(self, host: bool = False) -> None:
        super().__init__()
        self.host, self.strict, self.autocast = host, True, False
        self.calls = _Calls(self)

    def __enter__(self) -> "OnDevice":
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what meta does inside is not the model's doing
            out = func(*args, **(kwargs or {}))
        if self.strict:
            devices = {tensor.is_meta for tensor in _tensors((*args, out))}
            if False in devices and (not self.host or True in devices):
                raise HiddenCopyError(f"{func} with tensors of the host")
        return out

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        before, self.strict = self.strict, False
        try:
            yield
        finally:
            self.strict = before


def on_meta(monkeypatch: pytest.MonkeyPatch, host: bool = False) -> OnDevice:
    """A mode for a dry run; `upload` and `read_back` work without values, and autocast and flash attention exist on meta."""
    run = OnDevice(host)

    def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        with run.relaxed():
            return torch.as_tensor(values, dtype=dtype).to(device)

    for module in (segments, forward):
        monkeypatch.setattr(module, "upload", upload)
    monkeypatch.setattr(
        segments, "read_back", lambda found: [3, 1, 0, *[0] * (len(found) - 3)] if found.is_meta else found.tolist()
    )
    monkeypatch.setattr(step, "read_back", lambda tensor: [2.0, 1.0])
    monkeypatch.setattr(validation, "read_back", lambda tensor: 2.0)
    monkeypatch.setattr(gpu_attention, "has_flash", lambda device: device == META)

    class Autocast:
        def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
            assert device_type == "meta" and dtype in (None, torch.bfloat16, torch.float32)
            self.enabled = enabled

        def __enter__(self) -> None:
            self.before, run.autocast = run.autocast, self.enabled

        def __exit__(self, *error: Any) -> None:
            run.autocast = self.before

    monkeypatch.setattr(torch, "autocast", Autocast)
    for module in (layers, feed_forward, loss, modeling):
        monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16 if run.autocast else None)
    return run


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _result_device(args: Any, kwargs: Any) -> torch.device:
    named = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device, Tensor))]
    if not named:
        return args[0].device
    return named[0].device if isinstance(named[0], Tensor) else torch.device(named[0])


def _is_empty(values: Any) -> bool:
    return isinstance(values, list) and not values


def _holds_list(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) or (isinstance(part, Tensor) and not part.is_meta) for part in parts)
