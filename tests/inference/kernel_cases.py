"""Inputs for the tests of kernels, whatever the device, and the truth in float64."""

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from yoco_u.inference.kernels import decode_attention, direct

DTYPES = [torch.float32, torch.bfloat16]
CACHES = [torch.float32, torch.bfloat16, torch.int8]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8}  # half a unit in the last place, relative
head_dims = st.sampled_from([8, 32, 40, 64, 128])
seeds = st.integers(0, 10**6)


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_rounded(found: Tensor, exact: Tensor, absolute: float = 2e-6) -> None:
    """`exact` in float64, rounded once to the dtype of `found` and computed in float32 before; NaN where it is NaN."""
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[found.dtype] * 1.01 + 2e-6, atol=absolute, equal_nan=True)


@dataclass
class Case:
    """Paged sequences whose other rows are NaN: reading one of them would show."""

    q: Tensor
    cache: Tensor
    scales: Tensor | None
    table: Tensor
    block_size: int
    lengths: Tensor

    def rows(self, i: int) -> list[int]:
        """Of sequence i, in order."""
        blocks = self.table[i].tolist()
        return [blocks[at // self.block_size] * self.block_size + at % self.block_size for at in range(int(self.lengths[i]))]

    @property
    def exact(self) -> Tensor:
        """The output in float64."""
        return self.truth()[0]

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """In float64, head by head: the output, the same of the values' sizes, and the log-sum-exp of the scores."""
        kv = self.cache.double() if self.scales is None else self.cache.double() * self.scales.double()[..., None]
        out, sizes = (torch.empty(self.q.shape, dtype=torch.float64) for _ in range(2))
        lse = torch.empty(self.q.shape[:2], dtype=torch.float64)
        groups = self.q.shape[1] // self.cache.shape[1]
        for i, head in itertools.product(range(len(self.q)), range(self.q.shape[1])):
            k, v = kv[:, head // groups, self.rows(i)]
            scores = k @ self.q[i, head].double() * self.q.shape[-1] ** -0.5
            out[i, head], sizes[i, head] = scores.softmax(0) @ v, scores.softmax(0) @ v.abs()
            lse[i, head] = scores.logsumexp(0)
        return out, sizes, lse

    def found(self, direct_twin: bool = False) -> Tensor:
        call = direct.decode_attention if direct_twin else decode_attention
        return call(self.q, self.cache, self.scales, self.table, self.block_size, self.lengths)


def paged(
    seed: int,
    dtype: torch.dtype,
    kind: torch.dtype,
    head_dim: int,
    groups: int,
    kv_heads: int,
    lengths: list[int],
    block_size: int,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *(-(-length // block_size) for length in lengths))
    blocks = sum(-(-length // block_size) for length in lengths) + 3
    order = torch.randperm(blocks, generator=generator).int()
    table = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
    cache = torch.full((2, kv_heads, blocks * block_size, head_dim), torch.nan)
    q = random(generator, len(lengths), groups * kv_heads + 2, head_dim, dtype=dtype)[:, :-2] * 2  # a part of a larger tensor
    case = Case(q, cache, None, table, block_size, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        own = -(-length // block_size)
        table[i, :own], order = order[:own], order[own:]
        cache[:, :, case.rows(i)] = random(generator, 2, kv_heads, length, head_dim)
    if kind == torch.int8:
        case.cache, case.scales = direct.quantized(cache)
    else:
        case.cache = cache.to(kind)
    return case


def split_keys(generator: torch.Generator, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as a joint projection gives them: side by side in one row."""
    joint = random(generator, tokens, (3 * heads) * head_dim, dtype=dtype)
    _, k, v = joint.split([heads * head_dim] * 3, dim=-1)
    return k.view(tokens, heads, head_dim), v.view(tokens, heads, head_dim)
