"""The engine's memory: pages for what grows with the context, rings for windows, states for retention; nothing else.

Every slot of the architecture, a (stage, loop, layer), has storage of its own, and so has each global KV. A sequence has one
block table, which serves all its slots that grow with the context. Windows need no table: a sequence has a seat, a number below
`max_num_seqs`, which is its place in every ring and every state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_u.architecture import Architecture, Slot
from yoco_u.budget import KVType
from yoco_u.inference.kernels import store_rows
from yoco_u.inference.kernels.direct import quantized

STORAGE: dict[KVType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


_FRESH_BYTES = 2**26  # an allocation of so many bytes or more comes from the system, which maps pages as they are written


class KVStorage:
    """Keys and values of one slot, one row for each token, in blocks of rows.

    An int8 cache holds each key and value as head_dim whole numbers times one float32 scale. Every token attends to keys and
    values as they were rounded for storage, even to its own, so that results do not depend on how a prompt was cut into chunks.

    Attributes:
        data: (2, kv_heads, rows, head_dim).
        scales: (2, kv_heads, rows), float32, of an int8 cache.
        block_size: rows of a block. A ring is one block of `window` rows.
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

    def as_stored(self, x: Tensor) -> Tensor:
        """Keys or values (..., head_dim) rounded as storing and reading them would."""
        if self.scales is None:
            return x if x.dtype == self.data.dtype else x.to(self.data.dtype).to(x.dtype)
        whole, scales = quantized(x)
        return (whole * scales[..., None]).to(x.dtype)

    def fill(self, blocks: Tensor, dtype: torch.dtype) -> None:
        """Write random keys and values, drawn in `dtype`, to all rows of some blocks (blocks,)."""
        rows = (blocks[:, None] * self.block_size + torch.arange(self.block_size, device=blocks.device)).flatten()
        _, heads, _, head_dim = self.data.shape
        for part in rows.split(4096):
            k, v = (torch.randn(len(part), heads, head_dim, device=part.device).to(dtype) for _ in range(2))
            self.store(part, k, v)

    def release(self) -> None:
        """Give a CPU's memory back to the system until it is written again; what was stored is lost.

        A GPU's memory stays, at the same address, which CUDA graphs have recorded.
        """
        if self.data.device.type != "cpu":
            return
        make = torch.empty_like if self.data.nbytes >= _FRESH_BYTES else torch.zeros_like
        self.data = make(self.data)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.data] if self.scales is None else [self.data, self.scales]


@dataclass(frozen=True)
class CacheShape:
    """How much a cache holds.

    Attributes:
        num_blocks, block_size: of the pages, in tokens.
        max_num_seqs: seats, that is, how many sequences have rings and states at a time.
        window: rows of a ring: the model's window, or the longest context if that is shorter.
        kind: of keys and values.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    window: int | None
    kind: KVType


class KVCache:
    """Storage of all slots and of the global KVs; there is none before `grow`.

    Attributes:
        global_kvs: those of an architecture with a cross-decoder.
        pages: of the slots of full attention.
        rings: of the sliding slots.
        states: of the retention slots, each (seats, heads, head_dim, head_dim), float32.
    """

    def __init__(self, architecture: Architecture, shape: CacheShape, device: torch.device) -> None:
        self.architecture, self.shape, self.device = architecture, shape, device
        self.global_kvs: list[KVStorage] = []
        self.pages: dict[Slot, KVStorage] = {}
        self.rings: dict[Slot, KVStorage] = {}
        self.states: dict[Slot, Tensor] = {}

    def grow(self, num_loops: int) -> None:
        """Make storage for the slots of so many loops; what is there stays as it is, also where that fails."""
        a = self.architecture.with_loops(num_loops)
        global_kvs: list[KVStorage] = []
        pages: dict[Slot, KVStorage] = {}
        rings: dict[Slot, KVStorage] = {}
        states: dict[Slot, Tensor] = {}
        if a.has_global_kv and not self.global_kvs:
            global_kvs = [self._pages() for _ in range(a.global_kvs)]
        for slot in a.slots():
            if slot.attention == "full" and slot not in self.pages:
                pages[slot] = self._pages()
            elif slot.attention == "sliding" and slot not in self.rings:
                assert self.shape.window is not None
                rings[slot] = self._storage(self.shape.max_num_seqs, self.shape.window)
            elif slot.attention == "retention" and slot not in self.states:
                size = (self.shape.max_num_seqs, a.num_attention_heads, a.head_dim, a.head_dim)
                states[slot] = torch.zeros(size, device=self.device)
        self.global_kvs += global_kvs
        self.pages |= pages
        self.rings |= rings
        self.states |= states

    def window_state(self, seat: int, num_loops: int) -> list[Tensor]:
        """A copy of all that a sequence of so many loops keeps in its seat: the rows of its rings, and its retention states."""
        return [tensor.clone() for tensor in self._of_seat(seat, num_loops)]

    def restore(self, seat: int, num_loops: int, state: list[Tensor]) -> None:
        """Copy a window state into a seat."""
        for tensor, kept in zip(self._of_seat(seat, num_loops), state, strict=True):
            tensor.copy_(kept)

    def ring_rows(self, seat: int, start: int, stop: int) -> list[int]:
        """The rows, in every ring, of the tokens start .. stop - 1 of a sequence, at most `window` of them."""
        window = self.shape.window
        return [] if window is None else [seat * window + position % window for position in range(start, stop)]

    def keep_rings(self, rows: Tensor) -> list[Tensor]:
        """A copy of some rows (rows,) of all rings, for `take_back`."""
        return [tensor[:, :, rows] for ring in self.rings.values() for tensor in ring.tensors]

    def take_back(self, rows: Tensor, kept: list[Tensor], which: Tensor) -> None:
        """Let rows of all rings hold again what they held before.

        Args:
            rows, kept: what `keep_rings` was given and gave.
            which: indices of the rows among these.
        """
        tensors = [tensor for ring in self.rings.values() for tensor in ring.tensors]
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.index_copy_(2, rows[which], before.index_select(2, which))

    def read_by(self, slot: Slot) -> KVStorage:
        """The global KV that a slot of cross-attention reads."""
        return self.global_kvs[self.architecture.global_kv_of(slot.stage, slot.layer)]

    def clear(self, seat: int) -> None:
        """Set the retention states of a seat to zero. Rings can stay: no row of theirs is read before it is written."""
        for state in self.states.values():
            state[seat].zero_()

    def fill(self, seat: int, blocks: list[int], dtype: torch.dtype) -> None:
        """Write random keys and values, drawn in `dtype`, to a sequence's rings and blocks, for measurements."""
        for ring in self.rings.values():
            ring.fill(torch.tensor([seat], device=self.device), dtype)
        for storage in self._paged:
            storage.fill(torch.tensor(blocks, device=self.device), dtype)

    def release(self) -> None:
        """Let go of all keys and values; see `KVStorage.release`."""
        for storage in (*self._paged, *self.rings.values()):
            storage.release()

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, those of all ParScale streams."""
        a = self.architecture
        return a.num_key_value_heads * (a.parallel.streams if a.parallel else 1)

    @property
    def has_window_state(self) -> bool:
        """Whether a sequence keeps anything in its seat."""
        return bool(self.rings or self.states)

    @property
    def nbytes(self) -> int:
        """Bytes allocated; what `yoco_u.budget.cache_bytes` says."""
        kept = [tensor for storage in (*self._paged, *self.rings.values()) for tensor in storage.tensors]
        return sum(tensor.nbytes for tensor in (*kept, *self.states.values()))

    @property
    def _paged(self) -> list[KVStorage]:
        return [*self.pages.values(), *self.global_kvs]

    def _of_seat(self, seat: int, num_loops: int) -> list[Tensor]:
        loops = [stage.loops for stage in self.architecture.with_loops(num_loops).stages]
        found = []
        for slot, ring in self.rings.items():
            if slot.loop < loops[slot.stage]:
                rows = slice(seat * ring.block_size, (seat + 1) * ring.block_size)
                found += [tensor[:, :, rows] for tensor in ring.tensors]
        found += [state[seat] for slot, state in self.states.items() if slot.loop < loops[slot.stage]]
        return found

    def _pages(self) -> KVStorage:
        return self._storage(self.shape.num_blocks, self.shape.block_size)

    def _storage(self, blocks: int, block_size: int) -> KVStorage:
        return KVStorage(self.kv_heads, blocks, block_size, self.architecture.head_dim, self.shape.kind, self.device)
