"""generate() against loops written by hand that run the whole text without a cache for every token."""

from typing import Any

import pytest
import torch
from checkpoints import tokenizer
from examples import covering
from models import EXPERTS, PRESETS, architecture, build
from models import tokens as any_tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from yoco_u import Architecture, YocoUForCausalLM, YocoUModel
from yoco_u.errors import UserError
from yoco_u.model import YocoUCache

NEW = 8
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"layers": 2}) for name in PRESETS},
    "yoco_u, rotated, gated": ("yoco_u", {"rope_cross": True, "loop_gate": 0.3}),
    "yoco, two global KVs": ("yoco", {"global_kvs": 2, "qk_norm": True}),
    "yoco_u, window 1": ("yoco_u", {"window": 1}),
    "yoco_u of experts": ("yoco_u", {"experts": EXPERTS}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str) -> YocoUForCausalLM:
    name, settings = VARIANTS[variant]
    return build(architecture(name, **settings), pad_token_id=0)


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Without the padding token, from which generate() would infer a mask."""
    return any_tokens(batch, length, seed=seed).clamp(min=1)


@torch.no_grad()
def greedy(model: YocoUForCausalLM, prompt: Tensor, new: int = NEW, **call: Any) -> Tensor:
    """(1, tokens) -> the new tokens."""
    ids = prompt
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False, **call).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompt.shape[1] :]


@torch.no_grad()
def sample(model: YocoUForCausalLM, prompt: Tensor, temperature: float, top_k: int) -> Tensor:
    ids = prompt
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits[:, -1].float() / temperature
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return ids[:, prompt.shape[1] :]


@torch.no_grad()
def beam(model: YocoUForCausalLM, prompt: Tensor, beams: int) -> list[int]:
    """The most likely of the continuations that a beam search without an end token finds."""
    alive = [(0.0, prompt[0].tolist())]
    for _ in range(NEW):
        longer = []
        for score, ids in alive:
            log_probabilities = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            longer += [(score + float(p), [*ids, token]) for token, p in enumerate(log_probabilities)]
        alive = sorted(longer, reverse=True)[:beams]
    return alive[0][1][prompt.shape[1] :]


@pytest.mark.parametrize(("variant", "length"), covering(list(VARIANTS), [1, 8, 50]))
def test_greedy(variant: str, length: int) -> None:
    model, prompt = make(variant), tokens(1, length)
    expected = greedy(model, prompt)
    for call in ({}, {"use_cache": False}, {"prefill_chunk_size": 6}):
        out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, **call)
        assert torch.equal(out[:, length:], expected), call


@every_variant
def test_left_padded_batch(variant: str) -> None:
    model = make(variant)
    prompts = [tokens(1, length, seed=length) for length in (20, 3, 11)]
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, 20 - prompt.shape[1] :], mask[i, 20 - prompt.shape[1] :] = prompt[0], 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, 20:], torch.cat([greedy(model, prompt) for prompt in prompts]))


@every_variant
def test_sampling(variant: str) -> None:
    model, prompt = make(variant), tokens(2, 9)
    torch.manual_seed(5)
    expected = sample(model, prompt, temperature=0.8, top_k=20)
    torch.manual_seed(5)
    out = model.generate(prompt, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=20, top_p=1.0)
    assert torch.equal(out[:, 9:], expected)


@every_variant
def test_beams(variant: str) -> None:
    model, prompts = make(variant), tokens(2, 9)
    out = model.generate(prompts, max_new_tokens=NEW, num_beams=3, do_sample=False)
    assert out[:, 9:].tolist() == [beam(model, prompts[i : i + 1], 3) for i in range(2)]
    assert torch.equal(out, model.generate(prompts, max_new_tokens=NEW, num_beams=3, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    ("variant", "loops"), covering(["yoco_u", "upper_loop", "rins", "yoco_u, rotated, gated", "yoco"], [5, 2, 1])
)
def test_loops_in_generate(variant: str, loops: int) -> None:
    model, prompt = make(variant), tokens(1, 15)
    out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_loops=loops)
    assert torch.equal(out[:, 15:], greedy(model, prompt, num_loops=loops))
    beams = model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_loops=loops, num_beams=2)
    uncached = model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_loops=loops, num_beams=2, use_cache=False)
    assert torch.equal(beams, uncached)


@every_variant
def test_a_conversation_goes_on_with_its_cache(variant: str) -> None:
    model, prompt = make(variant), tokens(1, 15)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 19
    longer = torch.cat([first.sequences, tokens(1, 6, seed=3)], 1)
    out = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, longer.shape[1] :], greedy(model, longer))


@every_variant
def test_several_samples_of_one_prompt(variant: str) -> None:
    model, prompt = make(variant), tokens(2, 9)
    torch.manual_seed(5)
    expected = sample(model, prompt.repeat_interleave(3, 0), temperature=1.0, top_k=50)
    torch.manual_seed(5)
    out = model.generate(prompt, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, top_k=50)
    assert torch.equal(out[:, 9:], expected)


def test_inputs_embeds() -> None:
    model, prompt = make("yoco_u"), tokens(2, 9)
    embeds = model.get_input_embeddings()(prompt)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, model.generate(prompt, max_new_tokens=NEW, do_sample=False)[:, 9:])


@pytest.mark.parametrize("call", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_one_row_of_positions_for_all(call: dict[str, Any]) -> None:
    model, prompt, positions = make("yoco_u, rotated, gated"), tokens(2, 9), 7 + torch.arange(9)[None]
    call |= {"max_new_tokens": NEW, "do_sample": False}
    out = model.generate(prompt, position_ids=positions, **call)
    assert torch.equal(out, model.generate(prompt, position_ids=positions.expand(2, -1), **call))


def test_generation_stops_at_the_end_token() -> None:
    model, prompt = make("yoco_u"), tokens(2, 9)
    free = model.generate(prompt, max_new_tokens=NEW, do_sample=False)[:, 9:]
    end = int(free[0, 3])
    out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=end)[:, 9:]
    first = free[0].tolist().index(end)
    assert out[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(out[0, first + 1 :].tolist()) <= {0}


@every_variant
def test_assisted_decoding_changes_nothing(variant: str) -> None:
    """Guesses that are wrong are taken back out of the cache, which a retention state cannot do."""
    model, prompt = make(variant), tokens(1, 6).repeat(1, 4)
    assistant = build(architecture("yoco_u", layers=2), seed=7, pad_token_id=0)
    for call in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        if any(stage.attention == "retention" for stage in model.model.architecture.stages):
            with pytest.raises(UserError, match="cannot forget"):
                model.generate(prompt, max_new_tokens=NEW, do_sample=False, **call)
        else:
            out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, **call)
            assert torch.equal(out[:, 24:], greedy(model, prompt)), call


@pytest.mark.parametrize("said_by", ["the call", "the generation config"])
@pytest.mark.parametrize("assistant", ["of one loop", "Llama"])
def test_an_assistant_has_its_own_loop_count(assistant: str, said_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make("yoco_u"), tokens(1, 15)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    draft = make("yoco_u") if assistant == "of one loop" else LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0))
    seen: set[tuple[bool, int]] = set()
    run_stages = YocoUModel.run_stages

    def watched(self: YocoUModel, x: Tensor, backend: Any, architecture: Architecture, **kwargs: Any) -> Any:
        seen.add((self is model.model, architecture.num_loops))
        return run_stages(self, x, backend, architecture, **kwargs)

    monkeypatch.setattr(YocoUModel, "run_stages", watched)
    call: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "assistant_model": draft}
    if said_by == "the call":
        call["num_loops"] = 5
    else:
        model.generation_config.num_loops = 5
    if assistant == "of one loop":
        draft.generation_config.num_loops = 1
    out = model.generate(prompt, **call)
    assert seen == {(True, 5), *([(False, 1)] if assistant == "of one loop" else [])}
    assert torch.equal(out[:, 15:], greedy(model, prompt, num_loops=5))


@pytest.mark.parametrize("variant", ["yoco_u", "yoco_u, window 1"])
def test_a_cache_of_assisted_decoding_stays_small(variant: str) -> None:
    model, prompt = make(variant), tokens(1, 6).repeat(1, 4)
    cache, call = YocoUCache(model.model.architecture), {"max_new_tokens": NEW, "do_sample": False}
    out = model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **call)
    longer = model.generate(out, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert torch.equal(longer[:, out.shape[1] :], greedy(model, out, 30))
    window = model.config.window
    assert {layer.keys.shape[-2] for layer in cache.layers if layer.is_sliding} == {window - 1}


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(beams: int) -> None:
    """Generation ends with the first token that completes one; here every token is a character."""
    model, prompt, text = build(architecture(vocab_size=300), pad_token_id=0), tokens(1, 15), tokenizer()
    call = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams, "suppress_tokens": [0, 1, *range(96, 300)]}
    free = model.generate(prompt, **call)[0, 15:].tolist()
    out = model.generate(prompt, stop_strings=[text.decode(free[2:3])], tokenizer=text, **call)[0, 15:].tolist()
    assert free[2] not in out[:-1]
    if beams == 1:
        assert out == free[: free.index(free[2]) + 1]


def test_a_loop_count_of_none_is_none_given() -> None:
    model, prompt = make("yoco_u"), tokens(1, 15)
    model.generation_config.num_loops = 1
    given = [model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_loops=loops) for loops in (None, 1)]
    assert torch.equal(*given)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("yoco_u", {"loops": 2}),
        ("yoco_u", {"window": 16}),
        ("yoco_u", {"layers": 6}),
        ("yoco_u", {"num_key_value_heads": 1}),
        ("yoco_u", {"head_dim": 4}),
        ("yoco", {"global_kvs": 2}),
        ("rins", {"loops": 1}),
    ],
)
def test_a_cache_of_another_layout_is_refused(variant: str, change: dict[str, Any]) -> None:
    model, prompt = build(architecture(variant), pad_token_id=0), tokens(1, 15)
    cache = YocoUCache(architecture(variant, **change))
    with pytest.raises(UserError, match="use one cache per model and num_loops"):
        model(prompt, past_key_values=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(UserError, match="loops per stage"):
        model.generate(prompt, past_key_values=YocoUCache(model.model.at_loops(5)), max_new_tokens=2)


@torch.no_grad()
def test_a_cache_is_cropped_or_says_why_not() -> None:
    model, prompt = make("yoco_u"), tokens(1, 12)
    assert model.config.window == 8
    for recorded, past in ((True, 12), (False, 7), (False, 12)):
        cache = YocoUCache(model.model.architecture)
        cache.crop(-1)
        if recorded:
            cache.activate_past_recording()
        model(prompt[:, :past], past_key_values=cache)
        if not recorded:
            cache.crop(0)
            if past > 8:
                with pytest.raises(UserError, match=r"3 tokens .* activate_past_recording\(\)"):
                    cache.crop(-3)
                continue
        cache.crop(-3)
        found = model(prompt[:, past - 3 :], past_key_values=cache).logits
        torch.testing.assert_close(found, model(prompt, use_cache=False).logits[:, past - 3 :], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_a_cache_is_cropped_in_all_layers_or_in_none() -> None:
    """The first layers could take tokens back, a later one cannot."""
    stages = [{"attention": "full", "layers": 1}, {"attention": "sliding", "layers": 1}, {"attention": "cross", "layers": 1}]
    model = build(architecture("yoco", stages=stages))
    cache, prompt = YocoUCache(model.model.architecture), tokens(1, 12)
    model(prompt, past_key_values=cache)
    with pytest.raises(UserError, match="3 tokens were to be taken back"):
        cache.crop(-3)
    found = model(tokens(1, 2), past_key_values=cache).logits
    expected = model(torch.cat([prompt, tokens(1, 2)], dim=1), use_cache=False).logits[:, 12:]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@every_variant
@torch.no_grad()
def test_a_cache_of_other_rows_is_refused_until_it_is_reset(variant: str) -> None:
    model, cache = make(variant), YocoUCache(make(variant).model.architecture)
    with torch.inference_mode():
        model(tokens(2, 9), past_key_values=cache)
    for rows, length in ((1, 1), (3, 1), (1, 5)):
        with pytest.raises(UserError, match=f"a batch of 2; expected {rows}"):
            model(tokens(rows, length), past_key_values=cache)
    cache.reset()
    found = [model(part, past_key_values=cache).logits for part in tokens(3, 12).split([9, 3], dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), model(tokens(3, 12), use_cache=False).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_while_training_with_gradient_checkpointing(beams: int) -> None:
    """As trainers do that sample from the model that they train: blocks run once, so the cache is right."""
    model, prompt = make("yoco_u"), tokens(1, 15)
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_beams=beams)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_beams=beams), expected)
    cache = YocoUCache(model.model.architecture)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    with pytest.raises(UserError, match=r"past_key_values is filled, but gradient checkpointing"):
        model(prompt[:, :1], past_key_values=cache)


@pytest.mark.parametrize(("variant", "dtype"), covering(list(VARIANTS), [torch.bfloat16, torch.float32]))
def test_precisions_generate(variant: str, dtype: torch.dtype) -> None:
    model = make(variant).to(dtype)
    out = model.generate(tokens(2, 9), max_new_tokens=NEW, do_sample=True)
    assert out.shape == (2, 9 + NEW)
