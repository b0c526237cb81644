"""One forward pass, many ways to run it: each gives the same logits and the same gradients."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import covering
from models import EVERYTHING, EXPERTS, PRESETS, architecture, assert_same_gradients, build, gradients, tokens
from torch import Tensor

from yoco_u import Architecture, YocoUForCausalLM
from yoco_u.architecture import LOOPED
from yoco_u.errors import UserError
from yoco_u.model.backend import prepare_backend

pytestmark = pytest.mark.usefixtures("attention_path")
N, WINDOW = 29, 8
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "yoco_u with everything": ("yoco_u", EVERYTHING),
    "yoco_u, window 1": ("yoco_u", {"window": 1}),
    "yoco_u of experts": ("yoco_u", {"experts": EXPERTS}),
}


def every_variant(**axes: list[Any]) -> pytest.MarkDecorator:
    """Each on one of the attention paths, with one value of each other argument."""
    others = list(itertools.product(("blocks", "fused"), *axes.values()))
    cases = [(variant, *other) for variant, other in covering(list(VARIANTS), others)]
    return pytest.mark.parametrize(("variant", "attention_path", *axes), cases, indirect=["attention_path"])


def make(variant: str, **settings: Any) -> YocoUForCausalLM:
    """In float64 where torch can; retention and experts compute in float32."""
    name, options = VARIANTS[variant]
    model = build(architecture(name, **options | settings))
    return model if model.config.experts else model.double()


def tolerance(model: YocoUForCausalLM) -> float:
    exact = model.dtype == torch.float64 and all(s["attention"] != "retention" for s in model.config.stages)
    return 1e-8 if exact else 2e-4


def close(model: YocoUForCausalLM, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance(model), atol=tolerance(model))


def row_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed over the tokens of one document: each predicts the next one, (tokens, vocab) and (tokens,)."""
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


# The cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_in_chunks(variant: str) -> None:
    length = 2 * WINDOW + 4
    model, ids = make(variant), tokens(2, length)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    real = mask.bool()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        for chunk in (1, WINDOW - 1, WINDOW, WINDOW + 1):
            cache, parts = None, []
            for start in range(0, length, chunk):
                end = min(length, start + chunk)
                out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert cache.get_seq_length() == length
            close(model, torch.cat(parts, 1)[real], expected[real])


def test_a_long_text_continued_in_bands() -> None:
    """A chunk behind a full window that is itself long enough to be cut into bands."""
    model, ids = make("yoco_u"), tokens(2, 200)
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :90], use_cache=True)
        second = model(ids[:, 90:], past_key_values=first.past_key_values)
    close(model, torch.cat([first.logits, second.logits], 1), expected)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_sliding_caches_hold_no_more_than_the_window(window: int) -> None:
    """What is allocated, not only what is visible: a slice of a long prefill would keep all of it alive."""
    model = make("yoco_u", window=window)
    with torch.no_grad():
        cache = model(tokens(2, 100), use_cache=True).past_key_values
        for _ in range(3):
            for layer in cache.layers[:-1]:
                assert layer.keys.shape == layer.values.shape == (2, 2, window - 1, 8)
                for tensor in (layer.keys, layer.values):
                    assert tensor.untyped_storage().nbytes() <= 2 * 2 * (2 * window) * 8 * tensor.element_size()
            model(tokens(2, 1), past_key_values=cache)
    assert cache.layers[-1].keys.shape[-2] == 103
    assert len(cache.layers) == 2 * 3 + 1


@every_variant()
def test_training_with_a_cache_gives_the_same_gradients(variant: str) -> None:
    """Sharing keys and values through a cache object once broke the gradients of k_proj elsewhere; here they are the same."""
    model, ids = make(variant).train(), tokens(2, N)
    losses = [model(ids, labels=ids, use_cache=use_cache).loss for use_cache in (False, True)]
    expected, actual = (gradients(model, loss) for loss in losses)
    close(model, losses[1], losses[0])
    assert_same_gradients(actual, expected, tolerance(model))
    for name, gradient in expected.items():
        if name.endswith("k_proj.weight") and not (model.config.window == 1 and ".stages." in name):  # one key: no choice
            assert gradient.abs().max() > 1e-6, name


@every_variant(how=[(False, None), (True, True), (True, False)])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(variant: str, how: tuple[bool, bool | None]) -> None:
    use_reentrant, use_cache = how
    model, ids = make(variant, layers=2).train(), tokens(2, N)
    plain = model(ids, labels=ids, use_cache=False).loss
    expected = gradients(model, plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = model(ids, labels=ids, use_cache=use_cache)
    assert checkpointed.past_key_values is None
    close(model, checkpointed.loss, plain)
    checkpointed.loss.backward()
    actual = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_same_gradients(actual, expected, tolerance(model))


# Padding and packing


@every_variant(side=["left", "right"])
def test_padded_rows_equal_the_rows_alone(variant: str, side: str) -> None:
    model, lengths = make(variant, layers=2), [N, 17, 1]
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(3, N, dtype=torch.long), torch.zeros(3, N, dtype=torch.long)
    places = [slice(N - length, N) if side == "left" else slice(0, length) for length in lengths]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row[0], 1

    padded = model(ids, attention_mask=mask).logits
    alone = [model(row).logits[0] for row in rows]
    assert padded.isfinite().all()
    for i, (logits, place) in enumerate(zip(alone, places, strict=True)):
        close(model, padded[i, place], logits)
    loss = sum(row_loss(padded[i, place], ids[i, place]) for i, place in enumerate(places))
    expected = sum(row_loss(logits, row[0]) for logits, row in zip(alone, rows, strict=True))
    close(model, loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 10 * tolerance(model))


@every_variant(padding=[0, 6])
def test_packed_documents_equal_the_documents_alone(variant: str, padding: int) -> None:
    """Logits, loss and gradients."""
    model, lengths = make(variant, layers=2), [11, 1, 9, 50, 3]
    documents = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.cat([*documents, torch.zeros(1, padding, dtype=torch.long)], 1)
    document_ids = torch.repeat_interleave(torch.arange(len(lengths) + 1) + 7, torch.tensor([*lengths, padding]))[None]
    targets = torch.full_like(ids, -100)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for document, start in zip(documents, starts, strict=False):
        targets[0, start : start + document.shape[1] - 1] = document[0, 1:]

    call = {"attention_mask": (torch.arange(ids.shape[1]) < sum(lengths)).long()[None]} if padding else {}
    packed = model(ids, document_ids=document_ids, shift_labels=targets, use_cache=False, **call)
    alone = [model(document).logits[0] for document in documents]
    for logits, start in zip(alone, starts, strict=False):
        close(model, packed.logits[0, start : start + len(logits)], logits)
    count = int((targets != -100).sum())
    expected = sum(row_loss(logits, d[0]) for logits, d in zip(alone, documents, strict=True)) / count
    torch.testing.assert_close(packed.loss, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    loss = sum(row_loss(packed.logits[0, s : s + d.shape[1]], d[0]) for d, s in zip(documents, starts, strict=False)) / count
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 10 * tolerance(model))


def test_padding_leaves_a_retention_state_as_it_is() -> None:
    """A right-padded prompt that goes on from its cache: the padding in between neither adds to the state nor fades it."""
    model, ids, more = make("yoco_retention"), tokens(1, 9), tokens(1, 5, seed=3)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    with torch.no_grad():
        expected = model(torch.cat([ids, more], 1)).logits[:, 9:]
        cache = model(F.pad(ids, (0, 4)), attention_mask=mask, use_cache=True).past_key_values
        actual = model(more, attention_mask=F.pad(mask, (0, 5), value=1), past_key_values=cache).logits
    close(model, actual, expected)


def test_a_second_turn_that_is_padded_on_the_left() -> None:
    """Of a batch whose turns differ in length, behind caches that are full: the padding takes nothing away."""
    model, ids, more = make("yoco_retention"), tokens(1, 9), tokens(1, 5, seed=3)
    with torch.no_grad():
        expected = model(torch.cat([ids, more], 1)).logits[:, 9:]
        cache = model(ids, use_cache=True).past_key_values
        mask = torch.tensor([[1] * 9 + [0] * 3 + [1] * 5])
        actual = model(F.pad(more, (3, 0)), attention_mask=mask, past_key_values=cache).logits[:, 3:]
    close(model, actual, expected)


# Skipping the cross-decoder


@every_variant()
def test_logits_to_keep(variant: str) -> None:
    model, ids = make(variant, layers=2), tokens(2, N)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    mask[1, :4] = 0
    with torch.no_grad():
        for call in ({}, {"attention_mask": mask}):
            every = model(ids, **call).logits
            for keep in (1, 3, N, N + 5, [0], [5, 28], [28], [-1, 2, 2, -3]):
                places = torch.tensor(keep) if isinstance(keep, list) else torch.arange(max(0, N - keep), N)
                actual = model(ids, logits_to_keep=places if isinstance(keep, list) else keep, **call).logits
                close(model, actual, every[:, places])


@pytest.mark.parametrize("name", ["yoco", "yoco_u", "yoco_retention", "upper_loop"])
def test_the_cross_decoder_runs_on_kept_positions_only(name: str) -> None:
    model, ids = make(name), tokens(2, N)
    counts: dict[str, list[int]] = {"self": [], "kv": [], "cross": []}
    for part, module in (("self", model.model.stages[0]), ("kv", model.model.global_kv), ("cross", model.model.stages[1])):
        module.register_forward_pre_hook(lambda _, args, part=part: counts[part].append(args[0].shape[1]))
    cross_tokens = []
    for layer in model.model.stages[1].layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: cross_tokens.append(args[0].shape[1]))

    with torch.no_grad():
        model(ids, logits_to_keep=2)
        model(ids, logits_to_keep=torch.tensor([1, 4, 9]))
        assert counts == {"self": [N, N], "kv": [N, N], "cross": [2, 3]}
        for found in counts.values():
            found.clear()
        cross_tokens.clear()
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert counts == {"self": [N, 1, 1, 1], "kv": [N, 1, 1, 1], "cross": [1, 1, 1, 1]}
    assert set(cross_tokens) == {1}


@pytest.mark.parametrize("name", ["yoco_u", "upper_loop"])
def test_gradients_through_kept_positions(name: str) -> None:
    model, ids = make(name), tokens(2, N)
    places = torch.tensor([3, 17])
    kept, full = (f.double().pow(2).sum() for f in (model(ids, logits_to_keep=places).logits, model(ids).logits[:, places]))
    assert_same_gradients(gradients(model, kept), gradients(model, full), 1e-6)


# Loops


@pytest.mark.parametrize("tied", [False, True])
def test_one_loop_is_yoco(tied: bool) -> None:
    recursive = make("yoco_u", tie_word_embeddings=tied)
    plain = make("yoco", tie_word_embeddings=tied)
    plain.load_state_dict(recursive.state_dict())
    ids = tokens(2, N)
    assert torch.equal(recursive(ids, num_loops=1).logits, plain(ids).logits)


@pytest.mark.parametrize(("name", "loops", "gate"), covering(sorted(LOOPED), [1, 2, 5], [None, 0.3]))
def test_loops_at_call_time_equal_a_config_with_them(name: str, loops: int, gate: float | None) -> None:
    model = make(name, layers=2, loops=loops + 1, loop_gate=gate)
    settings = {"loops": loops} | ({"loop_gate": gate} if loops > 1 else {})
    if loops == 1:  # the config of T=1 is that of the same stages without a loop
        stages = tuple(stage.model_copy(update={"loops": 1, "loop_gate": None}) for stage in model.model.architecture.stages)
        other = build(Architecture(**model.model.architecture.model_dump() | {"stages": stages})).double()
    else:
        other = make(name, layers=2, **settings)
    weights = model.state_dict()
    for key in [key for key in weights if "loop_gates" in key]:
        weights[key] = weights[key][: loops - 1]
        if loops == 1:
            del weights[key]
    other.load_state_dict(weights)
    ids = tokens(2, N)
    ours, theirs = model(ids, labels=ids, num_loops=loops), other(ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    actual, expected = gradients(model, ours.loss), gradients(other, theirs.loss)
    for key in [key for key in actual if "loop_gates" in key]:
        assert actual[key][loops - 1 :].abs().sum() == 0  # unused gates get no gradient
        actual[key] = actual[key][: loops - 1]
        if loops == 1:
            del actual[key]
    assert_same_gradients(actual, expected, 1e-9)


@pytest.mark.parametrize("name", ["yoco_u", "universal_transformer", "rins", "upper_loop_without_shared_kv"])
def test_a_pass_that_goes_on_behind_its_first_loop(name: str) -> None:
    model, ids, positions = make(name).model, tokens(1, N), torch.arange(N)[None]
    one, three = model.at_loops(1), model.at_loops(3)
    with torch.no_grad():
        expected = model(ids, use_cache=False, num_loops=3).last_hidden_state
        first, rest = (prepare_backend(a, 1, positions, None, None, N, None, torch.float64) for a in (one, three))
        states = model.run_first_loop(model.embed_tokens(ids), first, one)
        found, _ = model.run_stages(states, rest, three, first_loop=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_variant()
def test_more_loops_than_trained_run(variant: str) -> None:
    model, ids = make(variant), tokens(2, N)
    with torch.no_grad():
        out = model(ids, labels=ids, num_loops=8)
        cached = model(ids, num_loops=8, use_cache=True).past_key_values
        step = model(tokens(2, 1), num_loops=8, past_key_values=cached)
    assert out.logits.isfinite().all()
    assert out.loss.isfinite()
    assert step.logits.isfinite().all()


@pytest.mark.parametrize("loops", [0, -1, True, 2.0, "3"], ids=repr)
def test_impossible_loop_counts(loops: Any) -> None:
    with pytest.raises(UserError, match="num_loops"):
        make("yoco_u")(tokens(1, 3), num_loops=loops)


# Arguments


def test_labels_and_shift_labels() -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    labels = ids.clone()
    labels[0, :9] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
    for call in ({"labels": labels}, {"shift_labels": shifted}, {"labels": labels, "shift_labels": shifted}):
        torch.testing.assert_close(model(ids, **call).loss, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(summed, expected * (shifted != -100).sum() / 100, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert model(ids).loss is None


@every_variant()
def test_inputs_embeds(variant: str) -> None:
    model, ids = make(variant, layers=2), tokens(2, N)
    with torch.no_grad():
        close(model, model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    for call in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, N, 32)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**call)


@every_variant()
def test_positions_are_relative(variant: str) -> None:
    """Except for ParScale, whose prefixes are at no position."""
    model, ids = make(variant, layers=2), tokens(2, N)
    with torch.no_grad():
        expected = model(ids).logits
        close(model, model(ids, position_ids=torch.arange(N)[None]).logits, expected)
        moved = model(ids, position_ids=torch.arange(N).expand(2, -1) + 40).logits
    if variant != "parscale":
        torch.testing.assert_close(moved, expected, rtol=2e-4, atol=2e-4)


def test_hidden_states() -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, logits_to_keep=1)
    assert [h.shape[1] for h in out.hidden_states] == [N] * 7 + [1] * 2  # the embedding, then each block
    close(model, model.lm_head(out.hidden_states[-1]), out.logits)


def test_inputs_that_contradict_each_other() -> None:
    model, ids = make("yoco_u"), tokens(2, N)
    cache = model(ids, use_cache=True).past_key_values
    wrong: dict[str, dict[str, Any]] = {
        "attention_mask has shape": {"attention_mask": torch.ones(2, N + 1)},
        "document_ids has shape": {"document_ids": torch.ones(2, N - 1)},
        "document_ids came with a filled cache": {"document_ids": torch.ones(2, N), "past_key_values": cache},
        "the cache was made for loops per stage": {"num_loops": 2, "past_key_values": cache},
        "past_key_values is a tuple": {"past_key_values": ()},
    }
    for message, call in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            model(ids, **call)
        assert "\n" not in str(error.value)


# Precision


@every_variant()
def test_bfloat16_and_autocast_stay_close_to_float32(variant: str) -> None:
    model, ids = make(variant, layers=2).float(), tokens(2, N)
    exact = model(ids, labels=ids)
    expected = gradients(model, exact.loss)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, labels=ids)
    assert mixed.logits.dtype == torch.bfloat16
    actual = gradients(model, mixed.loss)
    half = build(model.model.architecture).bfloat16()(ids, labels=ids)
    for out in (mixed, half):
        assert (out.logits.float() - exact.logits).abs().mean() < 0.1 * exact.logits.std()
        assert (out.loss - exact.loss).abs() < 0.05 * exact.loss
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (actual, expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.97
