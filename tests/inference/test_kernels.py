"""Every compiled kernel against its direct twin or float64 over random shapes, and doing without them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from examples import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CACHES, DTYPES, Case, assert_rounded, head_dims, paged, random, seeds, split_keys

from yoco_u.errors import UserError
from yoco_u.inference.kernels import decode_attention, direct, retention_step, store_rows
from yoco_u.inference.kernels.cpu import compiled
from yoco_u.inference.kernels.gpu.splits import merge_attention
from yoco_u.model.rope import rotary_angles, rotate

needs_kernels = pytest.mark.skipif(not compiled(), reason="needs a C++ compiler")

cases = st.builds(
    paged,
    seeds,
    st.sampled_from(DTYPES),
    st.sampled_from(CACHES),
    head_dims,
    st.integers(1, 8),
    st.integers(1, 3),
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.sampled_from([1, 3, 5, 16, 64, 200]),
)


@needs_kernels
@settings(max_examples=examples(80))
@given(cases)
def test_decode_attention(case: Case) -> None:
    assert_rounded(case.found(), case.exact)
    assert_rounded(case.found(direct_twin=True), case.exact)


@needs_kernels
def test_what_lies_beyond_the_cache_is_refused() -> None:
    """As by the direct twins, and not read or written."""
    cache, x = torch.zeros(2, 1, 32, 8), torch.zeros(1, 1, 8)
    for block, length in ((2, 1), (-1, 1), (0, 17), (0, -1)):
        table = torch.tensor([[block]], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="beyond the cache or its block table"):
            decode_attention(x, cache, None, table, 16, torch.tensor([length]))
    for call in (store_rows, direct.store_rows):
        with pytest.raises((RuntimeError, IndexError)):
            call(x, x, torch.tensor([32]), cache, None)
    with pytest.raises(RuntimeError, match="scalar type"):
        store_rows(x, x.bfloat16(), torch.tensor([0]), cache, None)
    with pytest.raises(RuntimeError, match="needs scales"):
        store_rows(x, x, torch.tensor([0]), cache.char(), None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("count", [1, 2])
def test_decode_attention_of_long_sequences_in_parts(count: int, kind: torch.dtype) -> None:
    with threads(count):
        for lengths in ([5000], [1025, 1, 3000, 2048], [1] * 40):
            case = paged(1, torch.float32, kind, 8, 2, 2, lengths, 16)
            assert_rounded(case.found(), case.exact)


@needs_kernels
@pytest.mark.parametrize(("of", "place"), covering(list(itertools.product(CACHES, DTYPES)), ["query", "key", "value"]))
def test_decode_attention_keeps_nan_where_it_is(of: tuple[torch.dtype, torch.dtype], place: str) -> None:
    """Of one sequence and head; the others, in whose order of work it comes first, in the middle and last, go on."""
    kind, dtype = of
    for sequence, at, groups in itertools.product((0, 1, 2), (0, 16, 36), (1, 3)):
        case = paged(sequence, dtype, kind, 40, groups, 2, [37, 40, 38], 5)
        if place == "query":
            case.q[sequence, groups, 3] = torch.nan
        else:
            which, row = int(place == "value"), case.rows(sequence)[at]
            if case.scales is None:
                case.cache[which, 1, row, 7 if place == "key" else slice(None)] = torch.nan
            else:
                case.scales[which, 1, row] = torch.nan
        found = case.found()
        assert bool(found[sequence, groups].isnan().all())
        assert_rounded(found, case.exact)
        assert_rounded(case.found(direct_twin=True), case.exact)
        others = found[[i for i in range(3) if i != sequence]]
        assert not bool(others.isnan().any()) and not bool(found[sequence, :groups].isnan().any())


@needs_kernels
def test_decode_attention_of_extreme_scores() -> None:
    """Scores of thousands, all on one key, and equal ones."""
    case = paged(1, torch.float32, torch.float32, 32, 2, 2, [60, 33, 1], 16)
    case.q *= 1000
    assert_rounded(case.found(), case.exact)
    case.q.zero_()
    assert_rounded(case.found(), case.exact)


@needs_kernels
@settings(max_examples=examples(40))
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(CACHES),
    head_dim=head_dims,
    heads=st.integers(1, 4),
    tokens=st.integers(0, 70),
    special=st.sampled_from([None, None, torch.nan, torch.inf]),
)
def test_store_rows(
    seed: int, dtype: torch.dtype, kind: torch.dtype, head_dim: int, heads: int, tokens: int, special: float | None
) -> None:
    """Bit for bit what the direct way stores, and nothing else is touched; row -1 stands for nowhere."""
    generator = torch.Generator().manual_seed(seed)
    k, v = split_keys(generator, tokens, heads, head_dim, dtype)
    if tokens:
        k[0, 0] = 0
        if special is not None:
            v[-1, -1, 5] = special
    rows = torch.randperm(90, generator=generator)[:tokens]
    rows[torch.rand(tokens, generator=generator) < 0.2] = -1
    caches = [torch.full((2, heads, 90, head_dim), 3).to(kind) for _ in range(2)]
    scales = [torch.full((2, heads, 90), 5.0) if kind == torch.int8 else None for _ in range(2)]
    store_rows(k, v, rows, caches[0], scales[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yoco_u.inference.kernels.compiled", lambda: False)
        store_rows(k, v, rows, caches[1], scales[1])
    if scales[0] is None or scales[1] is None:
        torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)
        return
    torch.testing.assert_close(scales[0], scales[1], rtol=0, atol=0, equal_nan=True)
    if special is not None and tokens and rows[-1] >= 0:
        assert not bool(scales[0].isfinite().all())
        keep = scales[0].isfinite()
        caches = [cache[keep] for cache in caches]
    assert torch.equal(*caches)


@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 200),
    rows=st.integers(1, 70),
    magnitude=st.sampled_from([1.0, 1e-12, 1e12]),
)
@needs_kernels
def test_rms_norm(seed: int, dtype: torch.dtype, size: int, rows: int, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, rows, 3, size + 2, dtype=dtype)[..., :-2] * magnitude  # not contiguous
    weight = random(generator, size, dtype=dtype)
    x[-1, 1, 0] = torch.nan
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    found = torch.ops.yoco_u.rms_norm(x, weight, 1e-6)
    assert int(found.isnan().any(-1).sum()) == 1
    assert_rounded(found, exact)


@given(seed=seeds, dtype=st.sampled_from(DTYPES), head_dim=head_dims, heads=st.integers(1, 6), tokens=st.integers(1, 70))
@needs_kernels
def test_rotate(seed: int, dtype: torch.dtype, head_dim: int, heads: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = split_keys(generator, tokens, heads, head_dim, dtype)[0][None]
    positions = torch.randint(100_000, (1, tokens), generator=generator)
    angles = rotary_angles(positions, head_dim, 10_000.0)
    cos, sin = (angle.double() for angle in angles)
    left, right = x.double().chunk(2, dim=-1)
    exact = x.double() * cos + torch.cat([-right, left], dim=-1) * sin
    assert_rounded(torch.ops.yoco_u.rotate(x, *angles), exact)
    assert_rounded(rotate(x, angles), exact)


@given(seed=seeds, dtype=st.sampled_from(DTYPES), size=st.integers(1, 600), rows=st.integers(0, 70))
@needs_kernels
def test_swiglu(seed: int, dtype: torch.dtype, size: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, rows, 1, 2 * size, dtype=dtype) * 3
    if rows:
        x[0, 0, 0] = 88.0  # of the gate: large, very small, far below all exponents
        x[-1, 0, size - 1] = -1e4
        x[rows // 2, 0, size // 2] = torch.nan
    gate, up = x.double().chunk(2, dim=-1)
    assert_rounded(torch.ops.yoco_u.swiglu(x), gate * gate.sigmoid() * up)


@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    groups=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    prefix=st.integers(1, 20),
)
def test_a_prefix_is_seen_before_the_rows(seed: int, dtype: torch.dtype, groups: int, lengths: list[int], prefix: int) -> None:
    """Against all keys in one sequence, and as parts that are merged."""
    generator = torch.Generator().manual_seed(seed)
    case = paged(seed, dtype, torch.float32, 16, groups, 2, lengths, 8)
    k, v = (random(generator, prefix, 2, 16) for _ in range(2))
    found = decode_attention(case.q, case.cache, None, case.table, 8, case.lengths, prefix=(k, v))
    exact = torch.empty(case.q.shape, dtype=torch.float64)
    for i, head in itertools.product(range(len(lengths)), range(2 * groups)):
        keys, values = (
            torch.cat([own[:, head // groups], case.cache[which, head // groups, case.rows(i)]]).double()
            for which, own in enumerate((k, v))
        )
        exact[i, head] = (keys @ case.q[i, head].double() / 4).softmax(0) @ values
    assert_rounded(found, exact)
    rows, _, lse = case.truth()
    assert_rounded(merge_attention(rows.float(), lse.float(), *direct.prefix_attention(case.q, k, v)), exact, 5e-6)


def test_retention_step() -> None:
    """By the formula in float64; a sequence without a seat changes nothing."""
    q, k, v = (torch.randn(4, 3, 5) for _ in range(3))
    log_decay, states, seats = -torch.rand(4, 3), torch.randn(6, 3, 5, 5), torch.tensor([4, -1, 0, 5])
    expected, outputs = states.double(), torch.zeros(4, 3, 5, dtype=torch.float64)
    for i, head in itertools.product((0, 2, 3), range(3)):
        state = expected[seats[i], head]
        state.mul_(log_decay[i, head].double().exp()).add_(torch.outer(k[i, head].double(), v[i, head].double()))
        outputs[i, head] = q[i, head].double() @ state
    assert_rounded(retention_step(q, k, v, log_decay, states, seats), outputs)
    assert_rounded(states, expected)


def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOCO_U_KERNELS", "off")
    assert not compiled.__wrapped__()
    monkeypatch.setenv("YOCO_U_KERNELS", "0")
    with pytest.raises(UserError, match="YOCO_U_KERNELS is '0'; expected on or off"):
        compiled.__wrapped__()


def test_no_compiler_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("YOCO_U_KERNELS", "on")
    monkeypatch.setattr("yoco_u.device.shutil.which", lambda name: None)
    assert not compiled.__wrapped__()
    assert "no C++ compiler here" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "g++-99")
    assert not compiled.__wrapped__()
    assert "no C++ compiler here ('g++-99', as CXX says)" in capsys.readouterr().err
