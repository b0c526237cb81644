import random
from itertools import pairwise

import pytest
from examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from yoco_u.inference.block_pool import BlockPool, chain_hash, root_hash


def chain(count: int, num_loops: int = 1) -> list[bytes]:
    hashes = [root_hash(num_loops)]
    for number in range(count):
        hashes.append(chain_hash(hashes[-1], [number]))
    return hashes[1:]


def cached(pool: BlockPool, count: int, num_loops: int = 1) -> list[int]:
    """Blocks of a sequence that came and went, its content kept."""
    blocks = pool.allocate(count)
    for block, content in zip(blocks, chain(count, num_loops), strict=True):
        pool.register(block, content)
    pool.release(blocks)
    return blocks


def test_hashes_name_the_tokens_all_before_them_and_the_loop_count():
    one = chain_hash(root_hash(1), [1, 2])
    assert one == chain_hash(root_hash(1), (1, 2))
    others = [
        chain_hash(root_hash(2), [1, 2]),
        chain_hash(root_hash(1, 0.5), [1, 2]),
        chain_hash(root_hash(1, 0.25), [1, 2]),
        chain_hash(root_hash(1), [2, 1]),
        chain_hash(root_hash(1), [1, 2, 3]),
        chain_hash(one, [1, 2]),
        chain_hash(root_hash(1), [1 + 2**32, 2]),
    ]
    assert len({one, *others}) == 8
    assert one.hex().startswith("88f7a7d9"), "the same in every process"


def test_a_small_sequence_begins_in_the_middle_of_the_longest_run_a_large_one_at_its_start():
    pool = BlockPool(16)
    assert pool.allocate(8) == list(range(8, 16))
    assert pool.allocate(5) == list(range(5))
    assert pool.allocate(1) == [6]


def test_growth_takes_the_block_behind_while_it_is_free():
    pool = BlockPool(16)
    (first,) = pool.allocate(1)
    assert first == 8
    assert pool.allocate(3, after=first) == [9, 10, 11]
    assert pool.allocate(1) == [4]
    assert pool.allocate(5, after=4) == [5, 6, 7, 2, 3], "what does not fit behind goes to the longest run that is left"
    assert pool.allocate(1, after=15) == [14], "behind the last block there is none"


def test_only_a_growth_that_cannot_go_on_searches_for_a_run(monkeypatch):
    pool = BlockPool(16)
    pool.allocate(4)
    monkeypatch.setattr(pool, "_start_of_run", lambda count: pytest.fail("searched"))
    assert pool.allocate(1, after=11) == [12]


def test_free_blocks_go_first_then_the_least_recently_used_content_from_its_end():
    pool = BlockPool(8)
    old = cached(pool, 3, num_loops=1)
    new = cached(pool, 2, num_loops=2)
    assert (pool.num_free, pool.num_cached, pool.num_available) == (3, 5, 8)
    pool.share(pool.match(chain(3, num_loops=1)))
    pool.release(old)  # used again, so now the other one is the older
    assert not set(pool.allocate(3)) & {*old, *new}
    assert pool.allocate(1) == [new[1]]
    assert pool.match(chain(2, num_loops=2)) == [new[0]]
    assert pool.allocate(2) and pool.match(chain(2, num_loops=2)) == []
    assert pool.match(chain(3, num_loops=1)) == old[:2]
    pool.check()


def test_blocks_are_shared_until_the_last_holder_leaves():
    pool = BlockPool(4)
    blocks = cached(pool, 2)
    for _ in range(2):
        pool.share(pool.match(chain(2)))
    assert [pool.refcounts[block] for block in blocks] == [2, 2] and pool.num_cached == 0
    pool.release(blocks)
    assert not set(pool.allocate(2)) & set(blocks)
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 available"):
        pool.allocate(1)
    pool.release(blocks)
    assert pool.num_cached == 2
    pool.check()


def test_of_equal_contents_the_first_is_known():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    content = chain(1)[0]
    pool.register(first, content)
    pool.register(second, content)
    pool.release([second, first])
    assert (pool.num_free, pool.num_cached) == (3, 1)
    assert pool.match([content]) == [first]


def test_forgotten_blocks_are_found_no_more_and_free_when_released():
    pool = BlockPool(4)
    blocks = cached(pool, 3)
    pool.share(blocks)
    pool.forget(blocks[1:])
    assert pool.match(chain(3)) == blocks[:1]
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (3, 1)
    pool.check()


def test_mistakes_of_the_caller_are_noticed():
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.register(block, b"one")
    with pytest.raises(AssertionError, match=f"block {block} is registered with another content"):
        pool.register(block, b"other")
    pool.release([block])
    with pytest.raises(AssertionError, match=f"block {block} was released more often than taken"):
        pool.release([block])
    with pytest.raises(AssertionError, match=f"block {block} is registered but not held"):
        pool.register(block, b"two")


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool.refcounts.__setitem__(0, 1),
        lambda pool: pool._is_free.__setitem__(0, 0),
        lambda pool: pool._cached.popitem(),
        lambda pool: pool._by_hash.popitem(),
        lambda pool: pool._hashes.__setitem__(0, b"stray"),
    ],
)
def test_check_finds_damage(damage):
    pool = BlockPool(8)
    cached(pool, 2)
    pool.check()
    damage(pool)
    with pytest.raises((AssertionError, KeyError)):
        pool.check()


class BlockTables(RuleBasedStateMachine):
    """Block tables of numbered contents come, share, grow and go; a plain dictionary says who holds what."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what lies in each block since it was last allocated

    @rule(num_loops=st.integers(1, 2), length=st.integers(1, 5), register=st.booleans())
    def come(self, num_loops, length, register):
        wanted = chain(length, num_loops)
        shared = self.pool.match(wanted)
        assert [self.contents[block] for block in shared] == wanted[: len(shared)], "found by a hash, but holds another content"
        idle = sum(self.pool.refcounts[block] == 0 for block in shared)
        if length - len(shared) > self.pool.num_available - idle:
            return
        self.pool.share(shared)
        table = shared + self.take(length - len(shared), shared[-1] if shared else None)
        for block, content in list(zip(table, wanted, strict=True))[len(shared) :]:
            self.contents[block] = content
            if register:
                self.pool.register(block, content)
        self.tables.append(table)

    def take(self, count, after):
        held = {block for table in self.tables for block in table}
        follows = after is not None and after + 1 < self.pool.num_blocks and self.pool._is_free[after + 1]
        cached_before, free_before = self.pool.num_cached, self.pool.num_free
        blocks = self.pool.allocate(count, after)
        assert len(set(blocks)) == count and not held & set(blocks), "a block was given twice"
        assert cached_before - self.pool.num_cached == max(0, count - free_before), "content was given up without need"
        if count and follows:
            assert blocks[0] == after + 1
        return blocks

    @precondition(lambda self: self.tables and self.pool.num_available)
    @rule(data=st.data())
    def grow(self, data):
        table = data.draw(st.sampled_from(self.tables))
        for block in self.take(1, table[-1]):
            self.contents[block] = b"unregistered"
            table.append(block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), forget=st.booleans())
    def go(self, data, forget):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if forget:
            self.pool.forget(table)
        self.pool.release(table)

    @invariant()
    def counts_are_those_of_the_tables(self):
        if hasattr(self, "pool"):
            self.pool.check()
            held = [block for table in self.tables for block in table]
            assert self.pool.refcounts == [held.count(block) for block in range(self.pool.num_blocks)]

    def teardown(self):
        for table in getattr(self, "tables", []):
            self.pool.release(table)
        if hasattr(self, "pool"):
            assert self.pool.num_available == self.pool.num_blocks


TestBlockTables = BlockTables.TestCase
TestBlockTables.settings = settings(max_examples=examples(40), stateful_step_count=25)


def test_sequences_that_grow_in_turn_stay_in_long_runs():
    """What the placement is for: reading a sequence's blocks in few pieces."""
    pool, draw = BlockPool(256), random.Random(0)
    tables = [pool.allocate(draw.randint(1, 8)) for _ in range(8)]
    for _ in range(16):
        for table in tables:
            table += pool.allocate(1, after=table[-1])
    pieces = [1 + sum(b != a + 1 for a, b in pairwise(table)) for table in tables]
    assert sum(pieces) <= 2 * len(tables)
