"""The blocks of the paged caches: who holds them, whose content can be shared, and which lie side by side."""

import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(num_loops: int, exit_threshold: float | None = None) -> bytes:
    """The hash that a request's first block is chained to. Requests of different loop counts, or of tokens that leave the loop
    by different thresholds, get different ones, since their keys and values differ although their tokens are equal."""
    leaving = b"" if exit_threshold is None else b" exit_threshold=%a" % exit_threshold
    return hashlib.sha256(b"num_loops=%d" % num_loops + leaving).digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block's content: of its own tokens and, through the hash of the block before, of all earlier tokens."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Blocks 0 .. num_blocks - 1, each in one of three states.

    Held: in as many block tables as `refcounts` says. Cached: in none, but its content is known by hash and can be shared
    again. Free: neither. A block that is released becomes cached if its content was registered, and free otherwise.

    Attributes:
        refcounts: per block, how many block tables hold it.
        changes: grows when blocks are released or registered, that is, when a request that found no room may find some.
    """

    def __init__(self, num_blocks: int) -> None:
        self.refcounts = [0] * num_blocks
        self.changes = 0
        self._is_free = bytearray(b"\x01" * num_blocks)
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_blocks(self) -> int:
        return len(self.refcounts)

    @property
    def num_free(self) -> int:
        return self._is_free.count(1)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: the free ones, and the cached ones in exchange for their content."""
        return self.num_free + self.num_cached

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take blocks, in runs as long as there are.

        Args:
            after: the block that the first one should follow; None for a new sequence.

        The block behind the previous one is taken if it is free. Otherwise allocation goes on in the longest free run, in its
        middle if half of it is enough: then the sequence that ends before the run and the sequence that begins in it both have
        room to grow. Cached blocks lose their content, least recently used first, only as far as free ones do not suffice.
        """
        assert count <= self.num_available, f"{count} blocks asked for, {self.num_available} available"
        for _ in range(count - self.num_free):
            block, _ = self._cached.popitem(last=False)
            self.forget([block])
            self._is_free[block] = 1
        blocks: list[int] = []
        upcoming = self.num_blocks if after is None else after + 1
        while len(blocks) < count:
            if upcoming == self.num_blocks or not self._is_free[upcoming]:
                upcoming = self._start_of_run(count - len(blocks))
            self._is_free[upcoming] = 0
            self.refcounts[upcoming] = 1
            blocks.append(upcoming)
            upcoming += 1
        return blocks

    def _start_of_run(self, count: int) -> int:
        """The block of the longest free run at which `count` blocks should begin; of equally long runs the first counts."""
        runs = (match.span() for match in re.finditer(rb"\x01+", self._is_free))
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        return (start + stop) // 2 if 2 * count <= stop - start else start

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block. A sequence's last blocks will lose their content before its earlier ones."""
        self.changes += 1
        for block in reversed(blocks):
            assert self.refcounts[block] > 0, f"block {block} was released more often than taken"
            self.refcounts[block] -= 1
            if self.refcounts[block] == 0:
                if self._hashes[block] is None:
                    self._is_free[block] = 1
                else:
                    self._cached[block] = None

    def register(self, block: int, content: bytes) -> None:
        """Make a held block that is full now known by its hash. Of several blocks of the same content the first stays known."""
        assert self.refcounts[block] > 0, f"block {block} is registered but not held"
        if content not in self._by_hash:
            assert self._hashes[block] is None, f"block {block} is registered with another content already"
            self._by_hash[content] = block
            self._hashes[block] = content
            self.changes += 1

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of hashes."""
        blocks: list[int] = []
        for content in hashes:
            block = self._by_hash.get(content)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of blocks that `match` found."""
        for block in blocks:
            if self.refcounts[block] == 0:
                del self._cached[block]
            self.refcounts[block] += 1

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody share these blocks from now on."""
        for block in blocks:
            content = self._hashes[block]
            if content is not None:
                del self._by_hash[content]
                self._hashes[block] = None

    def check(self) -> None:
        """Verify that every block is in exactly one state and that hashes and blocks name each other.

        Raises:
            AssertionError: if not.
        """
        for block, (refcount, content) in enumerate(zip(self.refcounts, self._hashes, strict=True)):
            states = (refcount > 0, block in self._cached, self._is_free[block] == 1)
            assert refcount >= 0 and sum(states) == 1, f"block {block}: refcount {refcount}, held, cached, free: {states}"
            assert content is None or self._by_hash[content] == block, f"block {block} is not known by its hash"
            assert refcount > 0 or states[1] == (content is not None), f"block {block}: cached without content, or free with it"
        assert len(self._by_hash) == sum(content is not None for content in self._hashes)
        assert self.num_free + self.num_cached + sum(refcount > 0 for refcount in self.refcounts) == self.num_blocks
