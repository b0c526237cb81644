"""Architectures as data: the presets, their sizes, YAML there and back, and what is refused with which line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERTS, architecture, build, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from yoco_u import Architecture, Stage, YocoUCache, YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import LOOPED, SIZES, STAGES, MixtureOfExperts, ParallelStreams, preset
from yoco_u.config import apply_overrides, dump_yaml, load_yaml, parse
from yoco_u.errors import UserError

TABLE = {
    "transformer": [("full", 20, 1)],
    "yoco": [("sliding", 10, 1), ("cross", 10, 1)],
    "yoco_retention": [("retention", 10, 1), ("cross", 10, 1)],
    "yoco_u": [("sliding", 10, 3), ("cross", 10, 1)],
    "universal_transformer": [("full", 20, 2)],
    "rins": [("full", 10, 3), ("full", 10, 1)],
    "upper_loop": [("sliding", 10, 1), ("cross", 10, 3)],
    "upper_loop_without_shared_kv": [("sliding", 10, 1), ("full", 10, 3)],
    "deep": [("sliding", 15, 1), ("cross", 15, 1)],
    "deeper": [("sliding", 20, 1), ("cross", 20, 1)],
    "parscale": [("full", 20, 1)],
}
"""The paper's comparison models of 20 layers (deep and deeper: of equal parameters)."""


def parameters(arch: Architecture) -> int:
    with torch.device("meta"):
        model = YocoUForCausalLM(YocoUConfig.from_architecture(arch))
    return sum({id(p): p.numel() for p in model.parameters()}.values())


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_papers_table(name: str) -> None:
    arch = preset(name, "1.3b")
    assert [(stage.attention, stage.layers, stage.loops) for stage in arch.stages] == TABLE[name]
    assert all(stage.loop_gate is None for stage in arch.stages)
    assert arch.hidden_size == (1792 if name == "deeper" else arch.hidden_size if name == "deep" else 2560)
    assert arch.window == (512 if "sliding" in str(arch.stages) else None)
    assert not arch.rope_cross
    assert not arch.qk_norm
    if name not in ("deep", "deeper"):
        assert arch.num_key_value_heads * arch.head_dim == 512
    assert (arch.parallel is not None) == (name == "parscale")


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(STAGES)
    assert {name for name, stages in TABLE.items() if any(loops > 1 for *_, loops in stages)} == set(LOOPED)


@pytest.mark.parametrize("name", TABLE)
def test_the_comparison_models_have_1_3_billion_parameters(name: str) -> None:
    assert 1.15e9 < parameters(preset(name, "1.3b")) < 1.55e9


@pytest.mark.parametrize("name", sorted(LOOPED))
def test_loops_cost_no_parameters(name: str) -> None:
    assert parameters(preset(name, "1.3b")) == parameters(preset(name, "1.3b").with_loops(1))


def test_the_mixture_has_10_billion_parameters() -> None:
    arch = preset("yoco_u", "10b-moe")
    assert arch.experts is not None
    assert (arch.experts.num_experts, arch.experts.experts_per_token, arch.experts.shared_experts) == (64, 8, 1)
    total = parameters(arch)
    expert = 3 * arch.hidden_size * arch.experts.intermediate_size
    assert 9.5e9 < total < 11e9
    assert 1.2e9 < 20 * (8 + 1) * expert < 1.4e9  # active for a token, in the feed-forward


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STAGES)
def test_every_preset_at_every_size(name: str, size: str) -> None:
    arch = preset(name, size)
    assert parse(Architecture, arch.model_dump(mode="json"), "x") == arch
    assert parse(Architecture, {"preset": name, "size": size}, "x") == arch


def test_parameters_of_the_sizes_named_by_them() -> None:
    assert 7e6 < parameters(preset("yoco_u", "8m")) < 9.5e6
    assert 85e6 < parameters(preset("yoco_u", "100m")) < 115e6


def test_presets_take_settings() -> None:
    arch = preset("yoco_u", "test", loops=5, loop_gate=0.1, window=3, layers=6, vocab_size=11)
    assert arch.stages[0] == Stage(attention="sliding", layers=3, loops=5, loop_gate=0.1)
    assert (arch.window, arch.vocab_size, arch.unrolled_layers) == (3, 11, 18)
    assert parse(Architecture, {"preset": "yoco_u", "size": "test", "loops": 5}, "x") == preset("yoco_u", "test", loops=5)
    assert preset("parscale", "test", streams=4, prefix_tokens=3).parallel == ParallelStreams(streams=4, prefix_tokens=3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_neighbouring_cross_layers_share_a_global_kv_in_even_groups(layers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sum(layers)))
    first = Stage(attention="full", layers=2)
    arch = architecture("yoco", window=None, stages=(first, *(Stage(attention="cross", layers=n) for n in layers)))
    arch = parse(Architecture, arch.model_dump() | {"global_kvs": count}, "x")
    read = [arch.global_kv_of(stage, layer) for stage, n in enumerate(layers, 1) for layer in range(n)]
    assert read == sorted(read) and set(read) == set(range(count))
    sizes = [read.count(number) for number in range(count)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("name", "count", "crossing"), [("yoco_u", 3, 2), ("upper_loop", 3, 2), ("transformer", 2, 0)])
def test_more_global_kvs_than_layers_that_read_them(name: str, count: int, crossing: int) -> None:
    with pytest.raises(UserError, match=f"global_kvs is {count}, but there are {crossing} cross layers"):
        preset(name, "test", global_kvs=count)


# YAML there and back


def stages() -> st.SearchStrategy[tuple[Stage, ...]]:
    def stage(kinds: list[str]) -> st.SearchStrategy[Stage]:
        looped = st.builds(
            Stage,
            attention=st.sampled_from(kinds),
            layers=st.integers(1, 9),
            loops=st.integers(2, 9),
            loop_gate=st.none() | st.floats(-2, 2),
        )
        return looped | st.builds(Stage, attention=st.sampled_from(kinds), layers=st.integers(1, 9))

    lower = st.lists(stage(["full", "sliding", "retention"]), min_size=1, max_size=3)
    return st.tuples(lower, st.lists(stage(["cross"]), max_size=2)).map(lambda parts: tuple(parts[0] + parts[1]))


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    chosen = draw(stages())
    kv_heads = draw(st.integers(1, 4))
    full_only = {stage.attention for stage in chosen} == {"full"}
    sliding = any(stage.attention == "sliding" for stage in chosen)
    streams = st.builds(ParallelStreams, streams=st.integers(2, 5), prefix_tokens=st.integers(1, 9))
    return Architecture(
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=8 * draw(st.integers(1, 99)),
        intermediate_size=draw(st.integers(1, 999)),
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        stages=chosen,
        window=draw(st.integers(1, 9999)) if sliding else None,
        rope_theta=draw(st.floats(1, 1e7)),
        rope_cross=any(stage.attention == "cross" for stage in chosen) and draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.floats(1e-12, 1)),
        experts=draw(st.none() | st.builds(MixtureOfExperts, intermediate_size=st.integers(1, 99).map(lambda n: 8 * n))),
        parallel=draw(streams) if full_only and draw(st.booleans()) else None,
    )


@given(architectures())
def test_yaml_round_trip(tmp_path: Path, arch: Architecture) -> None:
    path = tmp_path / "architecture.yaml"
    dump_yaml(arch, path)
    assert parse(Architecture, load_yaml(path), str(path)) == arch
    assert list(tmp_path.iterdir()) == [path]


@given(architectures())
def test_config_round_trip(arch: Architecture) -> None:
    config = YocoUConfig.from_architecture(arch)
    assert config.architecture == arch
    assert YocoUConfig.from_dict(config.to_dict()).architecture == arch
    assert config.num_hidden_layers == arch.unrolled_layers == sum(stage.layers * stage.loops for stage in arch.stages)


# What is refused

GOOD: dict[str, Any] = preset("yoco_u", "test").model_dump(mode="json")
SLIDING, CROSS = GOOD["stages"]
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no stages": ({"stages": []}, "stages is empty"),
    "cross first": ({"stages": [CROSS]}, "the first stage is cross"),
    "self-attention after cross": ({"stages": [SLIDING, CROSS, SLIDING]}, "only cross stages can follow a cross stage"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "heads 4 is not a multiple of num_key_value_heads 3"),
    "odd head_dim": ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even number"),
    "yarn at a base of 1": (
        {"rope_theta": 1.0, "rotary_scaling": {"type": "yarn", "factor": 2.0, "original_length": 64}},
        "rope_theta is 1, but yarn needs frequencies that fall",
    ),
    "no window": ({"window": None}, "a stage is sliding but window is not set"),
    "window 0": ({"window": 0}, "window: Input should be greater than 0, got 0"),
    "a window without use": ({"stages": [SLIDING | {"attention": "full"}]}, "window is 8 but no stage is sliding"),
    "loops 0": ({"stages": [SLIDING | {"loops": 0}, CROSS]}, "stages.0.loops: Input should be greater than 0, got 0"),
    "layers 0": ({"stages": [SLIDING, CROSS | {"layers": 0}]}, "stages.1.layers: Input should be greater than 0, got 0"),
    "a gate without a loop": ({"stages": [SLIDING | {"loops": 1, "loop_gate": 0.1}]}, "loop_gate gates the loops after"),
    "unknown attention": ({"stages": [SLIDING | {"attention": "mamba"}]}, "stages.0.attention: Input should be 'full', 's"),
    "streams that slide": ({"parallel": {"streams": 2}}, "parallel streams need full attention in every stage"),
    "one stream": ({"parallel": {"streams": 1}}, "parallel.streams: Input should be greater than or equal to 2"),
    "more experts than there are": (
        {"experts": {"num_experts": 4, "intermediate_size": 8}},
        "experts_per_token is 8 but there are 4 experts",
    ),
    "expert width that has no grouped product": ({"experts": {"intermediate_size": 12}}, "multiples of 8"),
    "unknown key": ({"windw": 3}, "unknown key windw: did you mean window?"),
    "unknown key in a stage": ({"stages": [SLIDING | {"loop": 2}]}, "unknown key stages.0.loop: did you mean loops?"),
    "misspelt key": ({"stages": [{"attention": "full", "layer": 2}]}, "unknown key stages.0.layer: did you mean layers?"),
    "unknown key in experts": ({"experts": {"experts": 3}}, "unknown key experts.experts: did you mean num_experts?"),
    "unknown key like nothing": ({"xyzzy": 3}, "unknown key xyzzy: known are"),
    "text for a number": ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer"),
    "unknown preset": ({"preset": "yoko"}, "unknown preset 'yoko': did you mean yoco?"),
    "unknown size": ({"preset": "yoco", "size": "7b"}, "unknown size '7b'"),
    "loops without a loop": ({"preset": "yoco", "loops": 2}, "yoco has no loop"),
    "loops 0 of a preset": ({"preset": "yoco_u", "loops": 0}, "loops: Input should be greater than 0, got 0"),
    "odd layers": ({"preset": "yoco", "layers": 5}, "layers is 5; expected an even number"),
    "unknown key beside a preset": ({"preset": "yoco", "windo": 5}, "unknown key windo: did you mean window?"),
    "a preset that is a list": ({"preset": ["yoco"]}, "unknown preset ['yoco']"),
    "a key that is a preset's argument": ({"preset": "yoco", "name": "x"}, "unknown key name"),
    "a key that is no text": ({"preset": "yoco", 3: 4}, "key 3 is no text"),
    "a key that is no text without a preset": ({3: 4}, "3"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_architectures_are_refused_in_one_line(case: str) -> None:
    change, message = IMPOSSIBLE[case]
    data = change if "preset" in change else GOOD | change
    with pytest.raises(UserError) as error:
        parse(Architecture, data, "model.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("model.yaml: ")
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"^model.yaml: head_dim is missing$"):
        parse(Architecture, {key: value for key, value in GOOD.items() if key != "head_dim"}, "model.yaml")


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_anything_but_a_mapping_is_refused(data: Any) -> None:
    with pytest.raises(UserError, match="expected a mapping of settings"):
        parse(Architecture, data, "model.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "not valid YAML"),
        (b"- 1", "expected a mapping"),
        (b"\xff\xfe", "not UTF-8 text"),
        (None, "check the path"),
    ],
)
def test_config_files_that_cannot_be_read(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        load_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides() -> None:
    data: dict[str, Any] = {"model": {"loops": 3}, "seed": 1}
    assert apply_overrides(data, ["model.loops=5", "model.window=null", "a.b=[1, x]", "seed=1e3"]) == {
        "model": {"loops": 5, "window": None}, "seed": "1e3", "a": {"b": [1, "x"]},
    }  # fmt: skip
    assert data == {"model": {"loops": 3}, "seed": 1}
    for wrong in ("seed", "=3", "seed.x=1", "a=[1"):
        with pytest.raises(UserError) as error:
            apply_overrides(data, [wrong])
        assert "\n" not in str(error.value)


# What follows from the stages

SMALL = {name: architecture(name) for name in STAGES} | {
    "gated": architecture("yoco_u", loop_gate=0.2),
    "gated upper loop": architecture("upper_loop", loops=2, loop_gate=0.2),
    "two looped stages": architecture("rins").model_copy(
        update={"stages": (*architecture("rins", loops=2).stages, Stage(attention="cross", layers=3, loops=4))}
    ),
    "experts": architecture("yoco_u", experts=EXPERTS),
}
every_architecture = pytest.mark.parametrize("name", SMALL)


@every_architecture
def test_slots_are_the_blocks_in_the_order_of_a_forward_pass(name: str) -> None:
    model, met = build(SMALL[name]), []
    for index, stack in enumerate(model.model.stages):
        for layer, block in enumerate(stack.layers):
            block.register_forward_hook(lambda *_, at=(index, layer): met.append(at))
    with torch.no_grad():
        model(tokens(1, 3), use_cache=False)
    slots = SMALL[name].slots()
    assert [(slot.stage, slot.layer) for slot in slots] == met
    assert len(slots) == len(set(slots)) == SMALL[name].unrolled_layers
    for number, slot in enumerate(slots):  # the loop's index is how often the same block was met before
        assert slot.loop == met[:number].count((slot.stage, slot.layer))
        assert slot.attention == SMALL[name].stages[slot.stage].attention


@every_architecture
def test_the_slots_with_a_cache_are_the_caches_of_a_real_cache(name: str) -> None:
    arch = SMALL[name]
    length, cache = 20, YocoUCache(arch)
    with torch.no_grad():
        build(arch)(tokens(1, length), past_key_values=cache, use_cache=True)
    with_cache = [slot for slot in arch.slots() if slot.has_cache]
    assert with_cache == list(arch.slots()[: len(with_cache)])  # so that slot numbers are the numbers of caches
    assert len(cache.layers) == len(with_cache) + arch.has_global_kv
    assert all(layer.is_initialized for layer in cache.layers)
    rows = {"full": length, "sliding": SMALL["yoco_u"].window - 1, "retention": arch.head_dim}
    assert [layer.keys.shape[2] for layer in cache.layers[: len(with_cache)]] == [rows[slot.attention] for slot in with_cache]
    if arch.has_global_kv:
        assert cache.layers[-1].keys.shape[2] == length


def test_looped_stages_and_the_models_own_loop_count() -> None:
    expected: dict[str, tuple[tuple[int, ...], int]] = {
        "transformer": ((), 1), "yoco": ((), 1), "parscale": ((), 1), "yoco_u": ((0,), 3), "universal_transformer": ((0,), 2),
        "upper_loop": ((1,), 3), "gated upper loop": ((1,), 2), "two looped stages": ((0, 2), 4),
    }  # fmt: skip
    for name, found in expected.items():
        assert (SMALL[name].looped_stages, SMALL[name].num_loops) == found
    assert {name for name in STAGES if SMALL[name].looped_stages} == LOOPED
    assert (SMALL["yoco_u"].with_loops(1).looped_stages, SMALL["yoco_u"].with_loops(1).num_loops) == ((), 1)
    assert (SMALL["yoco"].with_loops(5).looped_stages, SMALL["yoco"].with_loops(5).num_loops) == ((0,), 5)


def test_architectures_in_words() -> None:
    words = {
        "transformer": "4 full, width 32",
        "yoco": "2 sliding + 2 cross, width 32",
        "yoco_u": "2 sliding x3 + 2 cross, width 32",
        "gated": "2 sliding x3 gated + 2 cross, width 32",
        "two looped stages": "2 full x2 + 2 full + 3 cross x4, width 32",
    }
    assert architecture("yoco", global_kvs=2).in_words == "2 sliding + 2 cross, width 32, 2 global KVs"
    assert {name: SMALL[name].in_words for name in words} == words


@every_architecture
def test_the_dense_transformer_is_as_wide_and_has_as_many_layers(name: str) -> None:
    """Against a Llama of the same shape: the two have the same number of parameters."""
    arch, dense = SMALL[name], SMALL[name].dense_transformer()
    assert [(stage.attention, stage.loops) for stage in dense.stages] == [("full", 1)]
    layers, width = sum(stage.layers for stage in arch.stages), arch.intermediate_size
    if name == "experts":
        width = EXPERTS["intermediate_size"] * (EXPERTS["experts_per_token"] + EXPERTS["shared_experts"])
    llama = LlamaConfig(
        vocab_size=arch.vocab_size, hidden_size=arch.hidden_size, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=arch.num_attention_heads, num_key_value_heads=arch.num_key_value_heads, head_dim=arch.head_dim,
        tie_word_embeddings=arch.tie_word_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        twin = LlamaForCausalLM(llama)
    assert parameters(dense) == sum(p.numel() for p in twin.parameters())
    assert dense.dense_transformer() == dense


# Loops


def test_with_loops_changes_what_loops() -> None:
    assert [s.loops for s in preset("yoco_u", "test").with_loops(5).stages] == [5, 1]
    assert [s.loops for s in preset("upper_loop", "test").with_loops(2).stages] == [1, 2]
    assert [s.loops for s in preset("yoco", "test").with_loops(4).stages] == [4, 1]
    assert preset("yoco_u", "test", loops=7) == preset("yoco_u", "test").with_loops(7)
    for loops in (1, 2, 9):
        gated = preset("yoco_u", "test", loop_gate=0.2).with_loops(loops)
        assert parse(Architecture, gated.model_dump(mode="json"), "x") == gated
    for loops in (0, -2, 1.5, True, "2", None):
        with pytest.raises(UserError, match="num_loops is"):
            preset("yoco_u", "test").with_loops(loops)


def test_architectures_do_not_change() -> None:
    arch = preset("yoco_u", "test")
    with pytest.raises(ValueError, match="frozen"):
        arch.window = 3


@every_architecture
def test_slots_are_counted_as_they_are_listed(name: str) -> None:
    listed = [slot.attention for slot in SMALL[name].slots()]
    for kind in ("full", "sliding", "retention", "cross"):
        assert SMALL[name].num_slots(kind) == listed.count(kind)


def test_more_loops_than_anybody_waits_for() -> None:
    assert preset("yoco_u", "test").with_loops(256).num_slots("sliding") == 2 * 256
    for make in (lambda: preset("yoco_u", "test").with_loops(257), lambda: preset("yoco_u", "test", loops=257)):
        with pytest.raises(UserError, match="257 loops are too many, each takes the time of a pass; expected at most 256"):
            make()
