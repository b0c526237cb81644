"""The engine's memory: pages for what grows with the context, rings for windows, states for retention; nothing else.

Every slot, that is every (stage, loop, layer) that remembers, and the global KV, has storage of its own, and one block table
per sequence serves all slots that grow. A window needs no table: a sequence's seat is its row of every ring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.architecture import Architecture
from yoco_u.budget import KVType
from yoco_u.inference.kernels import quantized, store_rows

STORAGE: dict[KVType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Rows:
    """Keys and values of one slot, one row a token.

    An int8 cache holds each key and value as head_dim whole numbers times one float32 scale. What has been stored is what is
    seen, by the token that wrote it too, so results do not depend on how a prompt was cut.

    Attributes:
        data: (2, kv_heads, rows, head_dim).
        scales: (2, kv_heads, rows), float32, of an int8 cache.
        block_size: rows per block; those of a window ring for a ring.
    """

    def __init__(self, kv_heads: int, blocks: int, block_size: int, head_dim: int, kind: KVType, device: torch.device) -> None:
        shape = (2, kv_heads, blocks * block_size)
        self.block_size = block_size
        self.data = torch.zeros(*shape, head_dim, dtype=STORAGE[kind], device=device)
        self.scales = torch.zeros(shape, device=device) if kind == "int8" else None

    def store(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values, each (tokens, kv_heads, head_dim), to rows (tokens,)."""
        store_rows(k, v, rows, self.data, self.scales)

    def read(self, rows: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of some rows, each (1, rows, kv_heads, head_dim)."""
        kv = self.data[:, :, rows]
        if self.scales is not None:
            kv = kv.float() * self.scales[:, :, rows, None]
        k, v = kv.to(dtype).transpose(1, 2).unbind(0)
        return k[None], v[None]

    def seen(self, x: Tensor) -> Tensor:
        """Keys or values (..., head_dim) as they will be read after being stored."""
        if self.scales is None:
            return x if x.dtype == self.data.dtype else x.to(self.data.dtype).to(x.dtype)
        whole, scales = quantized(x)
        return (whole * scales[..., None]).to(x.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.data] if self.scales is None else [self.data, self.scales]


@dataclass(frozen=True)
class CacheShape:
    """How much a cache holds.

    Attributes:
        num_blocks, block_size: of the pages, in tokens.
        max_num_seqs: seats: sequences that have rings and states at a time.
        window: rows of a ring: the model's window, or the longest context if that is shorter.
        kind: of keys and values.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    window: int | None
    kind: KVType


class KVCache:
    """Storage of all slots, none before `grow`. Slots are named (stage, loop, layer), and None for the global KV."""

    def __init__(self, architecture: Architecture, shape: CacheShape, device: torch.device) -> None:
        self.architecture, self.shape, self.device = architecture, shape, device
        self.pages: dict[tuple[int, int, int] | None, Rows] = {}
        self.rings: dict[tuple[int, int, int], Rows] = {}
        self.states: dict[tuple[int, int, int], Tensor] = {}

    def grow(self, num_loops: int) -> None:
        """Make room for the slots of so many loops; what is there stays."""
        a = self.architecture.with_loops(num_loops)
        if a.has_global_kv and None not in self.pages:
            self.pages[None] = self._pages()
        for index, stage in enumerate(a.stages):
            for slot in ((index, loop, layer) for loop in range(stage.loops) for layer in range(stage.layers)):
                if stage.attention == "full" and slot not in self.pages:
                    self.pages[slot] = self._pages()
                elif stage.attention == "sliding" and slot not in self.rings:
                    assert self.shape.window is not None
                    self.rings[slot] = self._rows(self.shape.max_num_seqs, self.shape.window)
                elif stage.attention == "retention" and slot not in self.states:
                    size = (self.shape.max_num_seqs, a.num_attention_heads, a.head_dim, a.head_dim)
                    self.states[slot] = torch.zeros(size, device=self.device)

    def window_state(self, seat: int, num_loops: int) -> list[Tensor]:
        """A copy of all that a sequence of so many loops has in its seat."""
        return [tensor.clone() for tensor in self._of_seat(seat, num_loops)]

    def restore(self, seat: int, num_loops: int, state: list[Tensor]) -> None:
        """Put a copy of a window state into a seat."""
        for tensor, kept in zip(self._of_seat(seat, num_loops), state, strict=True):
            tensor.copy_(kept)

    def clear(self, seat: int) -> None:
        """Empty the retention states of a seat; rings need not be, as no row is read before it was written."""
        for state in self.states.values():
            state[seat].zero_()

    @property
    def has_window_state(self) -> bool:
        return bool(self.rings or self.states)

    @property
    def nbytes(self) -> int:
        """Bytes allocated; what `yoco_u.budget.cache_bytes` says."""
        rows = [tensor for slot in (*self.pages.values(), *self.rings.values()) for tensor in slot.tensors]
        return sum(tensor.nbytes for tensor in (*rows, *self.states.values()))

    def _of_seat(self, seat: int, num_loops: int) -> list[Tensor]:
        loops = [stage.loops for stage in self.architecture.with_loops(num_loops).stages]
        found = []
        for (stage, loop, _), ring in self.rings.items():
            if loop < loops[stage]:
                rows = slice(seat * ring.block_size, (seat + 1) * ring.block_size)
                found += [tensor[:, :, rows] for tensor in ring.tensors]
        found += [state[seat] for (stage, loop, _), state in self.states.items() if loop < loops[stage]]
        return found

    def _pages(self) -> Rows:
        return self._rows(self.shape.num_blocks, self.shape.block_size)

    def _rows(self, blocks: int, block_size: int) -> Rows:
        a = self.architecture
        heads = a.num_key_value_heads * (a.parallel.streams if a.parallel else 1)
        return Rows(heads, blocks, block_size, a.head_dim, self.shape.kind, self.device)
