"""The Triton kernels compiled for an H100 without one: as launched for the paper's 1.3B models, and how they fill it."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from yoco_u.inference.kernels.gpu import attention, pointwise, retention, storing  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, BATCH = 20, 4, 128, 2560, 6912, 32
SHARED_MEMORY, REGISTERS, THREADS = 227 * 2**10, 2**16, 128  # of a multiprocessor of an H100, and of a program


class H100:
    """Stands in for Triton's driver: there is no device, but what would be compiled for one."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that are launched from now on, which are compiled but not run."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **settings: Any) -> None:
        kernels.append(run(self, *arguments, warmup=True, **settings))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", H100())
    return kernels


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers of a thread (REG) and bytes of its stack (STACK), to which registers would spill."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}


def attend(batch: int, kind: torch.dtype, dtype: torch.dtype = torch.bfloat16, plan: Tensor | None = None) -> None:
    """Launch attention over pages of 256 tokens; `plan` is `sequence`, `first` and `last` in one."""
    items, rows, wide = 256, 2**16, torch.float32
    plan = meta(items, dtype=torch.int32) if plan is None else plan
    attention.attend_items(
        meta(batch, HEADS, HEAD_DIM, dtype=dtype), meta(2, KV_HEADS, rows, HEAD_DIM, dtype=kind),
        meta(2, KV_HEADS, rows, dtype=wide) if kind == torch.int8 else None,
        meta(batch, 32 * batch - 1, dtype=torch.int32), 256, plan, plan, plan,
        meta(items, HEADS, HEAD_DIM, dtype=wide), meta(items, HEADS, dtype=wide), False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
def test_decode_attention_fills_an_h100(compiled: list[Any], tmp_path: Path, kind: torch.dtype) -> None:
    """On tensor cores, without spills, with copies of 16 bytes on their way, and several programs a multiprocessor."""
    attend(BATCH, kind)
    used, ptx, shared = resources(compiled[0], tmp_path), compiled[0].asm["ptx"], compiled[0].metadata.shared
    print(f"{kind}: {used['REG']} registers, {used['STACK']} bytes of stack, {shared} bytes of shared memory")
    assert used["STACK"] == 0
    assert "mma.sync" in ptx and "cp.async.cg.shared.global" in ptx
    programs = 3 if kind == torch.bfloat16 else 2
    assert programs * (shared + 1024) <= SHARED_MEMORY
    assert programs * THREADS * -(-used["REG"] // 8) * 8 <= REGISTERS


@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_decode_attention_in_float32_does_not_spill(compiled: list[Any], tmp_path: Path, kind: torch.dtype) -> None:
    attend(BATCH, kind, torch.float32)
    assert resources(compiled[0], tmp_path)["STACK"] == 0


def test_batches_of_all_sizes_run_the_same_kernel(compiled: list[Any]) -> None:
    """Whatever the numbers, and wherever the plan lies within a larger buffer."""
    for batch, start in ((32, 0), (1, 1), (7, 2)):
        attend(batch, torch.bfloat16, plan=torch.zeros(300, dtype=torch.int32)[start:])
    for batch in (32, 1, 7):
        x = meta(1, batch, HIDDEN)
        pointwise.rms_norm(x, None, meta(HIDDEN), 1e-6, x, None)
    for batch in (32, 1, 7):
        x, angles = meta(1, batch, HEADS, HEAD_DIM), meta(1, batch, 1, HEAD_DIM, dtype=torch.float32)
        pointwise.rotate(x, angles, angles, x)
    for batch in (32, 1, 7):
        pointwise.swiglu(meta(batch, 2 * INNER), meta(batch, INNER))
    assert all(compiled[i] is compiled[i - i % 3] for i in range(12)) and len(compiled) == 12


def test_the_other_kernels_do_not_spill(compiled: list[Any], tmp_path: Path) -> None:
    wide, rows = torch.float32, 2**16
    attention.join_items(
        meta(256, HEADS, HEAD_DIM, dtype=wide), meta(256, HEADS, dtype=wide), meta(BATCH + 1, dtype=torch.int32),
        meta(BATCH, HEADS, HEAD_DIM), meta(BATCH, HEADS, dtype=wide),
    )  # fmt: skip
    heads = meta(BATCH, HEADS, HEAD_DIM)
    for kind in (torch.bfloat16, torch.int8):
        scales = meta(2, KV_HEADS, rows, dtype=wide) if kind == torch.int8 else None
        cache, slots = meta(2, KV_HEADS, rows, HEAD_DIM, dtype=kind), meta(BATCH, dtype=torch.int64)
        storing.store_rows(heads[:, :KV_HEADS], heads[:, KV_HEADS : 2 * KV_HEADS], slots, cache, scales)
    wide_heads = meta(BATCH, HEADS, HEAD_DIM, dtype=wide)
    states, seats = meta(BATCH, HEADS, HEAD_DIM, HEAD_DIM, dtype=wide), meta(BATCH, dtype=torch.int64)
    retention.retention_step(wide_heads, wide_heads, wide_heads, meta(BATCH, HEADS, dtype=wide), states, seats, wide_heads)
    x, weight = meta(1, BATCH, HIDDEN), meta(HIDDEN)
    pointwise.rms_norm(x, None, weight, 1e-6, x, None)
    pointwise.rms_norm(x, x, weight, 1e-6, x, x)
    angles = meta(1, BATCH, 1, HEAD_DIM, dtype=wide)
    pointwise.rotate(heads[None], angles, angles, heads[None])
    pointwise.swiglu(meta(1, BATCH, 2 * INNER), meta(1, BATCH, INNER))
    assert len(compiled) == 8
    for kernel in compiled:
        assert resources(kernel, tmp_path)["STACK"] == 0, kernel.name
