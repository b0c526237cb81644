"""The engine as it runs on a GPU, here on the CPU: its own backend and plans, decode steps recorded and replayed.

Each kernel is one operator by the direct formulas, and flash attention the stand-in of `flash.py`; `interpreted_engine.py` runs
the engine on the Triton kernels themselves.
"""

from functools import partial
from typing import Any

import pytest
import test_exits
import torch
from engine_runs import VARIANTS, WINDOW, assert_greedy, drafting_engine, greedy, prompt, run
from engine_runs import engine as make_engine
from examples import covering, examples
from flash import use_flash
from graph_recorder import GraphRecorder
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PRESETS, architecture
from test_engine_properties import VARIANTS as PROPERTY_VARIANTS
from test_engine_properties import Arrival, arrivals, engines, serve
from torch import Tensor

from yoco_u.budget import bytes_per_kv_element, cache_bytes
from yoco_u.inference import Engine, EngineSettings, decode_graphs, gpu_backend, runner
from yoco_u.inference.decode_graphs import buckets
from yoco_u.inference.kernels import direct


@torch.library.custom_op("yoco_u_test::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor, cache: Tensor, scales: Tensor | None, table: Tensor, block_size: int, lengths: Tensor, prefix: list[Tensor]
) -> Tensor:
    return direct.decode_attention(q, cache, scales, table, block_size, lengths, (prefix[0], prefix[1]) if prefix else None)


@torch.library.custom_op("yoco_u_test::retention_step", mutates_args=("states",))
def retention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, seats: Tensor) -> Tensor:
    return direct.retention_step(q, k, v, log_decay, states, seats)


@torch.library.custom_op("yoco_u_test::store_rows", mutates_args=("cache", "scales"))
def store_rows(k: Tensor, v: Tensor, rows: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    direct.store_rows(k, v, rows, cache, scales)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> GraphRecorder:
    """Lets engines run as on a GPU, where each kernel is one launch: here one operator, by the direct formulas."""
    found = GraphRecorder()
    monkeypatch.setattr("yoco_u.inference.engine.Runner", partial(runner.Runner, on_gpu=True, capture=found))
    monkeypatch.setattr(
        gpu_backend,
        "decode_attention",
        lambda q, cache, scales, table, size, lengths, plan=None, prefix=None: decode_attention(
            q, cache, scales, table, size, lengths, list(prefix or ())
        ),
    )
    monkeypatch.setattr("yoco_u.inference.step_retention.retention_step", retention_step)
    monkeypatch.setattr("yoco_u.inference.kv_cache.store_rows", store_rows)
    use_flash(monkeypatch)
    return found


def engine(variant: str = "yoco_u", **settings: Any) -> Engine:
    subject = make_engine(variant, **settings)
    assert subject.runner.decode_graphs is not None
    return subject


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture(variant: str, recorder: GraphRecorder) -> None:
    prompts = [prompt(length, seed=length) for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, 21)]
    for request in run(engine(variant), prompts, greedy(max_tokens=5)):
        assert_greedy(variant, request, new=5)
    assert recorder.replays > recorder.graphs > 0


@pytest.mark.parametrize(
    ("variant", "chunk"),
    covering([*PRESETS, "window 1", "window beyond the context", "experts", "four kinds"], [1, WINDOW - 1, 2 * WINDOW + 1]),
)
def test_every_chunk_size(variant: str, chunk: int, recorder: GraphRecorder) -> None:
    for length in (5, 2 * WINDOW + 5):
        [request] = run(engine(variant, max_batched_tokens=chunk, max_num_seqs=1), [prompt(length)], greedy(max_tokens=3))
        assert_greedy(variant, request, new=3)


@pytest.mark.parametrize("variant", [*PRESETS, "gated", "gated upper loop", "experts", "four kinds"])
def test_loop_counts_of_one_batch(variant: str, recorder: GraphRecorder) -> None:
    """Requests of fewer loops stand behind those of more, in the padding of their graphs."""
    loops = [1, 2, 3, 4, None, 2]
    prompts = [prompt(9 + 3 * (i // 2), seed=i // 2) for i in range(len(loops))]
    params = [greedy(num_loops=n, max_tokens=5) for n in loops]
    found = run(engine(variant, max_num_seqs=6, max_batched_tokens=13), prompts, params)
    for request, n in zip(found, loops, strict=True):
        assert_greedy(variant, request, n, 5)


@pytest.mark.parametrize(("variant", "by"), covering(["nearly closed gates", "rins", "window 3"], ["loops", "prompt"]))
def test_drafts(variant: str, by: str, recorder: GraphRecorder) -> None:
    """Beside requests that draft nothing."""
    subject = drafting_engine(variant, 3, max_num_seqs=3)
    params = [greedy(drafts=by), greedy(), greedy(drafts=by, num_loops=2)]
    for request, own in zip(run(subject, [prompt(7, seed=seed) * 3 for seed in range(3)], params), params, strict=True):
        assert_greedy(variant, request, own.num_loops)
    assert subject.speculation.accepted + subject.speculation.rejected > 0


@pytest.mark.parametrize("variant", test_exits.LEAVING)
def test_tokens_that_leave_the_loop(variant: str, recorder: GraphRecorder) -> None:
    """Against the direct twin; and beside requests of all other kinds they are what they are alone."""
    test_exits.test_every_architecture_against_the_twin(variant)
    if variant == "yoco_u":
        test_exits.test_requests_of_all_kinds_share_a_batch("int8")


def test_a_graph_is_recorded_once_for_each_bucket_and_segment(recorder: GraphRecorder) -> None:
    subject = engine(max_num_seqs=3, max_batched_tokens=60)
    prompts = [prompt(9, seed=seed) for seed in range(3)]
    for _ in range(2):
        run(subject, prompts, [greedy(num_loops=n) for n in (3, 3, 1)])
    # The first segment and the last one for 3 requests; each of the two further loops for the 2 that run it.
    assert recorder.graphs == 4


@given(variant=st.sampled_from(PROPERTY_VARIANTS), chosen=engines, traffic=st.lists(arrivals, min_size=1, max_size=12))
@settings(max_examples=examples(10))
def test_traffic(recorder: GraphRecorder, variant: str, chosen: dict[str, Any], traffic: list[Arrival]) -> None:
    """Prefix cache, snapshots, preemption, aborts, several outputs, scored prompts, loop counts: all at once."""
    serve(variant, chosen, traffic)


def test_defaults_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, a = torch.device("cuda"), architecture("yoco_u")
    chosen = EngineSettings(max_num_seqs=3, kv_dtype="bfloat16", dtype="bfloat16").on_device(cuda)
    assert (chosen.max_num_seqs, chosen.max_batched_tokens) == (3, 8192)
    assert EngineSettings().on_device(cuda).max_num_seqs == 64
    assert EngineSettings().on_device(torch.device("cpu")) == EngineSettings()
    for free, most in ((80 * 2**30, 0.8 * 80 * 2**30), (2**30, 2**29)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        shape = chosen.cache_shape(a, cuda)
        tokens = shape.num_blocks * shape.block_size
        bytes_ = cache_bytes(a, tokens, 3, shape.window or 0, bytes_per_kv_element(a, "bfloat16"))
        assert 0.9 * (most - 2**31 if free > 2**32 else most) < bytes_ <= most


@pytest.mark.parametrize("largest", [1, 2, 3, 16, 17, 64, 100])
def test_every_batch_has_a_bucket(largest: int) -> None:
    sizes = buckets(largest)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
    assert all(next(size for size in sizes if size >= n) < 2 * n + 16 for n in range(1, largest + 1))


@pytest.mark.parametrize(
    ("capability", "hip", "dtypes"),
    [((8, 0), None, []), ((8, 9), None, []), ((9, 0), None, ["bfloat16"]), ((10, 3), None, ["bfloat16"]), ((12, 0), None, []),
     ((9, 4), "6.4", [])],
    ids=str,
)  # fmt: skip
def test_what_waits_for_the_gpu_is_not_recorded(
    capability: tuple[int, int], hip: str | None, dtypes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch multiplies all groups of a mixture of experts in one kernel, as its sources have it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(decode_graphs, "cuda_graphs", lambda device: GraphRecorder())
    for variant in ("yoco_u", "experts"):
        name, changes = VARIANTS[variant]
        for dtype in (torch.float32, torch.bfloat16):
            is_recorded = variant == "yoco_u" or str(dtype).removeprefix("torch.") in dtypes
            capture = decode_graphs.capture_on(torch.device("cuda"), architecture(name, **changes), dtype)
            assert (capture is not None) == is_recorded
            assert decode_graphs.capture_on(torch.device("cpu"), architecture(name, **changes), dtype) is None
