"""The engine's kernels on the device, against direct formulas on the CPU over the same numbers."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpu_phases.check import FLOAT32, largest_error, verdict
from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale
from yoco_u.inference import kernels
from yoco_u.inference.kernels import direct, gpu
from yoco_u.inference.kernels.gpu.splits import SplitPlan, plan_splits, split_capacity

LIMITS = {"float32": FLOAT32, "bfloat16": 2e-2, "int8": 2e-2}
"""The largest errors, as shares of the largest entry of the truth; bfloat16 keeps 8 bits of each number."""

Shape = tuple[int, int, int]  # heads, kv heads, head_dim


def check_kernels(record: Record, scale: Scale) -> None:
    device = torch.device(scale.device)
    for shape in scale.attention_shapes:
        named = f"{shape[0]} heads of {shape[2]}, {shape[1]} kv"
        for kind in ("bfloat16", "float32", "int8"):
            checks = _Kernels(device, shape, kind, scale.attention_lengths)
            record.measure(f"decode attention, {named}, {kind}", checks.decode_attention)
            record.measure(f"decode attention with a prefix, {named}, {kind}", checks.prefix)
            record.measure(f"storing rows, {named}, {kind}", checks.store_rows)
        pointwise = _Pointwise(device, shape)
        record.measure(f"retention step, {named}", pointwise.retention_step)
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            record.measure(f"rotation, {named}, {name}", partial(pointwise.rotate, dtype))
            if device.type == "cuda":
                record.measure(f"norms and SwiGLU, {named}, {name}", partial(pointwise.norms, dtype))


class _Kernels:
    """Caches of one kind with random rows, in shuffled blocks, on the CPU and on the device."""

    def __init__(self, device: torch.device, shape: Shape, kind: str, lengths: tuple[int, ...]) -> None:
        heads, kv_heads, head_dim = shape
        self.device, self.kind = device, kind
        self.draw = torch.Generator().manual_seed(0)
        self.block_size = 256 if head_dim == 128 else 16
        self.lengths = torch.tensor([0, *lengths], dtype=torch.int32)
        most = -(-int(self.lengths.max()) // self.block_size)
        blocks = most * len(self.lengths)
        self.table = torch.randperm(blocks, generator=self.draw).view(len(self.lengths), most).to(torch.int32)
        rows = self._random(2, kv_heads, blocks * self.block_size, head_dim)
        self.scales = None
        if kind == "int8":
            self.cache, self.scales = direct.quantized(rows)
        else:
            self.cache = rows.to(getattr(torch, kind))
        self.dtype = torch.float32 if kind == "float32" else torch.bfloat16
        self.q = self._random(len(self.lengths), heads, head_dim).to(self.dtype)
        self.kv_heads, self.head_dim = kv_heads, head_dim

    def decode_attention(self) -> Figure:
        """With the keys of each sequence in one part, and divided among the multiprocessors."""
        truth = direct.decode_attention(self.q.float(), self.cache, self.scales, self.table, self.block_size, self.lengths)
        capacity = split_capacity(len(self.lengths), self.kv_heads, self.device)
        arrays = plan_splits(self.lengths.numpy().astype(np.int64), capacity)
        on_device = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        divided = SplitPlan(on_device["sequence"], on_device["first"], on_device["last"], on_device["offsets"])
        errors = {name: largest_error(self._attend(plan=plan), truth) for name, plan in (("whole", None), ("divided", divided))}
        worst = max(errors, key=lambda name: errors[name])
        return verdict(errors[worst], LIMITS[self.kind], where=worst)

    def prefix(self) -> Figure:
        """As ParScale's learned prefixes, which all sequences see."""
        k, v = (self._random(5, self.kv_heads, self.head_dim).to(self.dtype) for _ in range(2))
        truth = direct.decode_attention(
            self.q.float(), self.cache, self.scales, self.table, self.block_size, self.lengths, (k.float(), v.float())
        )
        found = self._attend(prefix=(k.to(self.device), v.to(self.device)))
        return verdict(largest_error(found, truth), LIMITS[self.kind])

    def store_rows(self) -> Figure:
        """Every number rounded as it should be, nothing where the row is -1; of int8 one in a thousand may be a step off."""
        tokens, size = 37, self.cache.shape[2]
        joint = self._random(tokens, 3 * self.kv_heads, self.head_dim).to(self.dtype)
        k, v = joint[:, : self.kv_heads], joint[:, self.kv_heads : 2 * self.kv_heads]  # strided, as in a joint product
        rows = torch.randperm(size, generator=self.draw)[:tokens]
        rows[::5] = -1
        truth, truth_scales = self.cache.clone(), None if self.scales is None else self.scales.clone()
        direct.store_rows(k, v, rows, truth, truth_scales)
        found, found_scales = self._there(self.cache), self._scales_there()
        on_device = joint.to(self.device)
        k, v = on_device[:, : self.kv_heads], on_device[:, self.kv_heads : 2 * self.kv_heads]
        kernels.store_rows(k, v, rows.to(self.device), found, found_scales)
        step = (found.cpu().float() - truth.float()).abs()
        error = float((step > 0).double().mean()) if self.kind == "int8" and float(step.max()) <= 1 else float(step.max())
        if truth_scales is not None and found_scales is not None:
            error = max(error, largest_error(found_scales, truth_scales))
        return verdict(error, 1e-3 if self.kind == "int8" else 0.0)

    def _attend(self, plan: SplitPlan | None = None, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, cache, table, lengths = (self._there(x) for x in (self.q, self.cache, self.table, self.lengths))
        return kernels.decode_attention(q, cache, self._scales_there(), table, self.block_size, lengths, plan, prefix)

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=True)

    def _scales_there(self) -> Tensor | None:
        return None if self.scales is None else self._there(self.scales)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.draw)


class _Pointwise:
    """What is done between the products."""

    def __init__(self, device: torch.device, shape: Shape) -> None:
        self.device, (self.heads, _, self.head_dim) = device, shape
        self.draw = torch.Generator().manual_seed(1)

    def retention_step(self) -> Figure:
        sequences, seats = 4, torch.tensor([2, -1, 0, 5])
        q, k, v = (self._random(sequences, self.heads, self.head_dim) for _ in range(3))
        log_decay = -self._random(sequences, self.heads).abs()
        states = self._random(6, self.heads, self.head_dim, self.head_dim)
        found_states = states.to(self.device, copy=True)
        there = [x.to(self.device) for x in (q, k, v, log_decay)]
        found = kernels.retention_step(there[0], there[1], there[2], there[3], found_states, seats.to(self.device))
        truth = direct.retention_step(q, k, v, log_decay, states, seats)
        return verdict(max(largest_error(found, truth), largest_error(found_states, states)), LIMITS["float32"])

    def rotate(self, dtype: torch.dtype) -> Figure:
        x = self._random(1, 9, self.heads, self.head_dim).to(dtype)
        angles = self._random(1, 9, 1, self.head_dim // 2).repeat(1, 1, 1, 2)
        found = kernels.rotate(x.to(self.device), (angles.cos().to(self.device), angles.sin().to(self.device)))
        first, second = x.float().chunk(2, dim=-1)
        truth = x.float() * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
        return verdict(largest_error(found, truth), LIMITS[str(dtype).removeprefix("torch.")])

    def norms(self, dtype: torch.dtype) -> Figure:
        """RMSNorm with and without a residual, and SwiGLU, at the width of all heads together."""
        size, eps = self.heads * self.head_dim, 1e-6
        x, residual, gate_up = self._random(7, size), self._random(7, size), self._random(7, 2 * size)
        x, residual, gate_up, weight = (y.to(dtype) for y in (x, residual, gate_up, 1 + 0.2 * self._random(size)))
        there = [y.to(self.device) for y in (x, residual, weight)]
        total = (x + residual).float()
        gate, up = gate_up.float().chunk(2, dim=-1)
        normed, summed = gpu.add_rms_norm(there[0], there[1], there[2], eps)
        pairs = {
            "rms_norm": (gpu.rms_norm(there[0], there[2], eps), _rms_norm(x.float(), weight.float(), eps)),
            "add_rms_norm": (normed, _rms_norm(total, weight.float(), eps)),
            "the sum of add_rms_norm": (summed, total),
            "swiglu": (gpu.swiglu(gate_up.to(self.device)), gate * torch.sigmoid(gate) * up),
        }
        errors = {name: largest_error(found, truth) for name, (found, truth) in pairs.items()}
        worst = max(errors, key=lambda name: errors[name])
        return verdict(errors[worst], LIMITS[str(dtype).removeprefix("torch.")], where=worst)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.draw)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
