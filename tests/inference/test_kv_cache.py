"""The bytes of the caches against the planner's arithmetic, and results with keys and values kept in less than float32."""

import pytest
import torch
from engine_runs import (
    VARIANTS,
    WINDOW,
    chosen_logprobs,
    engine,
    full_logprobs,
    greedy,
    output,
    prompt,
    run,
)
from examples import covering
from models import PRESETS

from yoco_u import Architecture
from yoco_u.architecture import Slot, preset
from yoco_u.budget import KVType, bytes_per_kv_element, cache_bytes, kv_bytes
from yoco_u.inference import Engine, EngineSettings
from yoco_u.inference.kv_cache import CacheShape, KVCache, KVStorage

MIB = 2**20
META = torch.device("meta")
KINDS: tuple[KVType, ...] = ("float32", "bfloat16", "int8")


def storages(cache: KVCache) -> dict[Slot | int, KVStorage]:
    return cache.pages | cache.rings | dict(enumerate(cache.global_kvs))


def allocated(a: Architecture, tokens: int, sequences: int = 1, block_size: int = 256, kind: KVType = "bfloat16") -> int:
    window = min(a.window, tokens) if a.window else None
    cache = KVCache(a, CacheShape(-(-tokens // block_size), block_size, sequences, window, kind), META)
    assert cache.nbytes == 0
    cache.grow(max(stage.loops for stage in a.stages))
    return cache.nbytes


@pytest.mark.parametrize(("name", "mib"), [("yoco_u", 542), ("yoco", 522), ("transformer", 10_240), ("rins", 20_480)])
def test_a_sequence_of_256k_tokens_takes_what_the_paper_says(name: str, mib: int) -> None:
    a = preset(name, "1.3b")
    assert allocated(a, 2**18) == kv_bytes(a, 2**18) == mib * MIB


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_allocates_what_the_planner_says(variant: str, kind: KVType) -> None:
    for settings in ({}, {"block_size": 3, "max_num_seqs": 7}, {"num_loops": 5}, {"cache_tokens": 5, "block_size": 1}):
        subject = engine(variant, kv_dtype=kind, **settings)
        shape, a = subject.cache.shape, subject.architecture.with_loops(subject.num_loops)
        rows = shape.num_blocks * shape.block_size
        window = min(a.window, rows) if a.window else 0
        expected = cache_bytes(a, rows, shape.max_num_seqs, window, bytes_per_kv_element(a, kind))
        assert subject.cache.nbytes == expected
        tensors = [tensor for rows in storages(subject.cache).values() for tensor in rows.tensors]
        assert expected == sum(tensor.untyped_storage().nbytes() for tensor in [*tensors, *subject.cache.states.values()])


@pytest.mark.parametrize("variant", ["yoco_u", "rins", "upper_loop"])
def test_more_loops_add_what_they_need_and_leave_what_is_there(variant: str) -> None:
    subject = engine(variant)
    cache, a = subject.cache, subject.architecture.with_loops(6)
    before = {name: rows.data for name, rows in storages(cache).items()}
    cache.grow(6)
    assert cache.nbytes == cache_bytes(a, 512, cache.shape.max_num_seqs, a.window or 0, 4)
    after = storages(cache)
    assert all(after[name].data is data for name, data in before.items())
    looped = a.looped_stages[0]
    added = {"yoco_u": 3 * 2, "rins": 3 * 2, "upper_loop": 0}[variant]  # loops times layers; cross stages own nothing
    assert [name.stage for name in after if name not in before and isinstance(name, Slot)] == [looped] * added


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_size_is_a_gibibyte(kind: KVType) -> None:
    for name in PRESETS:
        a = preset(name, "100m")
        shape = EngineSettings(dtype="float32", kv_dtype=kind).cache_shape(a, torch.device("cpu"))
        cache = KVCache(a, shape, META)
        cache.grow(max(stage.loops for stage in a.stages))
        block = cache_bytes(a, shape.block_size, 0, 0, bytes_per_kv_element(a, kind))
        assert 2**30 - block < cache.nbytes <= 2**30


@pytest.mark.parametrize("kind", KINDS)
def test_rows_read_what_was_stored_as_the_writer_saw_it(kind: KVType) -> None:
    rows = KVStorage(2, 4, 5, 8, kind, torch.device("cpu"))
    k, v = torch.randn(2, 6, 2, 8)
    k[3] = 0
    places = torch.tensor([4, 19, 0, 7, 8, 12])
    rows.store(places, k, v)
    read_k, read_v = rows.read(places, torch.float32)
    assert torch.equal(read_k[0], rows.as_stored(k)) and torch.equal(read_v[0], rows.as_stored(v))
    step = {"float32": 0, "bfloat16": 2**-8, "int8": 0.5 / 127}[kind]  # half a unit, of each number or of a row's largest
    largest = k.abs() if kind != "int8" else k.abs().amax(-1, keepdim=True)
    assert bool(((rows.as_stored(k) - k).abs() <= step * largest * 1.001).all())
    slice_k, _ = rows.read(slice(7, 9), torch.float32)
    assert torch.equal(slice_k[0], rows.as_stored(k)[3:5])
    assert int((rows.data != 0).any(-1).any(0).any(0).sum()) == 6


# Of log-probabilities: largest and mean distance from a float32 cache on these models, whose weights are large.
NEAR = {"bfloat16": (0.05, 0.006), "int8": (0.12, 0.02)}


CUT = 0.01  # sums in another order tip the rounding of a key here and there


def scores(subject: Engine, ids: list[int], loops: int | None = None) -> torch.Tensor:
    """Log-probabilities of a text's tokens after the first."""
    [request] = run(subject, [ids], greedy(prompt_logprobs=0, max_tokens=1, num_loops=loops))
    assert request.prompt_logprobs is not None
    return torch.tensor([one.chosen.logprob for one in request.prompt_logprobs if one is not None])


@pytest.mark.parametrize(("variant", "kind"), covering([*PRESETS, "window 1", "qk norm, rotated"], ["bfloat16", "int8"]))
def test_small_caches_are_near_float32_and_the_same_however_a_prompt_is_cut(variant: str, kind: KVType) -> None:
    ids = prompt(29)
    found = [
        scores(engine(variant, kv_dtype=kind, max_batched_tokens=chunk, max_num_seqs=1), ids) for chunk in (1, 5, WINDOW, 64)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=CUT)
    truth = full_logprobs(variant, ids)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    distance = (found[0] - truth).abs()
    assert float(distance.max()) < NEAR[kind][0]
    assert float(distance.mean()) < NEAR[kind][1]


@pytest.mark.parametrize(("variant", "kind"), covering(["yoco_u", "rins", "parscale"], ["int8", "bfloat16"]))
def test_small_caches_under_sharing_and_preemption(variant: str, kind: KVType) -> None:
    """What is reported of outputs in a crowd that gives way is what one prefill of the same text reports."""
    prompts = [[*prompt(9), *prompt(1 + i, seed=i)] for i in range(6)]
    small = engine(variant, kv_dtype=kind, cache_tokens=64, max_num_seqs=6, max_batched_tokens=12)
    found = run(small, prompts, [greedy(max_tokens=20, logprobs=0, num_loops=1 + i % 3) for i in range(6)])
    assert small.scheduler.statistics.preemptions > 0
    assert small.scheduler.statistics.prefix_hit_tokens > 0
    roomy = engine(variant, kv_dtype=kind, max_batched_tokens=64)
    for ids, request in zip(prompts, found, strict=True):
        alone = scores(roomy, ids + output(request), request.num_loops)[len(ids) - 1 :]
        torch.testing.assert_close(chosen_logprobs(request.outputs[0]), alone, rtol=0, atol=CUT)


@pytest.mark.parametrize("name", ["yoco_u", "transformer", "yoco_retention"])
def test_the_longest_request_fits_by_default(name: str) -> None:
    """However much more than 1 GiB that takes; less changes nothing."""
    a, cpu = preset(name, "1.3b"), torch.device("cpu")
    plain = EngineSettings(dtype="float32").cache_shape(a, cpu)
    longer = plain.num_blocks * plain.block_size + 1
    assert EngineSettings(dtype="float32", max_model_len=longer).cache_shape(a, cpu).num_blocks == plain.num_blocks + 1
    assert EngineSettings(dtype="float32", max_model_len=longer - 1).cache_shape(a, cpu).num_blocks == plain.num_blocks
    given = EngineSettings(dtype="float32", max_model_len=640, cache_tokens=600).cache_shape(a, cpu)
    assert given.num_blocks * given.block_size == 640
    with pytest.raises(ValueError, match="max_model_len is 641, but cache_tokens holds 600"):
        EngineSettings(max_model_len=641, cache_tokens=600)
