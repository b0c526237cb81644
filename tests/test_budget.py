"""The arithmetic of costs against real models, torch's FLOP counter and real caches."""

import pytest
import torch
from examples import covering
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yoco_u import Architecture, YocoUCache, YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import SIZES, STAGES, preset
from yoco_u.budget import (
    decode_bytes,
    decode_flops,
    forward_flops,
    kv_bytes,
    mean_visible_keys,
    optimizer_bytes,
    parameters,
    prefill_bytes,
    prefill_flops,
    training_flops,
)
from yoco_u.paper import KV_MEBIBYTES

EXPERTS = {"num_experts": 6, "experts_per_token": 2, "shared_experts": 1, "intermediate_size": 16}
VARIANTS = {
    "gated": preset("yoco_u", "test", loops=3, loop_gate=0.1),
    "qk_norm": preset("yoco_u", "test", qk_norm=True, tie_word_embeddings=True),
    "biases": preset("yoco_u", "test", attention_bias=True, global_kvs=2),
    "two_global_kvs": preset("yoco_u", "test", qk_norm=True, global_kvs=2),
    "retention": preset("yoco_retention", "test", qk_norm=True),
    "experts": preset("yoco_u", "test", experts=EXPERTS),
    "no_shared_expert": preset("transformer", "test", experts=EXPERTS | {"shared_experts": 0}),
    "streams": preset("parscale", "test", streams=3, prefix_tokens=5, qk_norm=True),
}


def model_of(a: Architecture, device: str = "cpu") -> YocoUForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return YocoUForCausalLM(YocoUConfig.from_architecture(a)).eval()


@pytest.mark.parametrize(("name", "size"), covering(list(STAGES), list(SIZES)))
def test_parameters_of_every_preset(name: str, size: str) -> None:
    a = preset(name, size)
    model = model_of(a, "meta")
    assert parameters(a).total == sum(p.numel() for p in model.parameters())
    assert parameters(a).embedding == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_options(variant: str) -> None:
    a = VARIANTS[variant]
    assert parameters(a).total == sum(p.numel() for p in model_of(a, "meta").parameters())


def test_active_parameters_are_those_that_one_token_gives_a_gradient_to() -> None:
    a = VARIANTS["experts"].with_loops(1)
    model = model_of(a).train()
    model(torch.tensor([[3]]), shift_labels=torch.tensor([[4]]), use_cache=False).loss.backward()
    met = 0
    for parameter in model.parameters():
        if parameter.ndim == 3:  # experts
            met += sum(expert.numel() for expert, g in zip(parameter, parameter.grad, strict=True) if g.abs().sum() > 0)
        else:
            met += parameter.numel()
    assert parameters(a).active == met < parameters(a).total
    assert parameters(VARIANTS["gated"]).active == parameters(VARIANTS["gated"]).total


def visible_pairs(tokens: int, window: int | None) -> int:
    return sum(1 for i in range(tokens) for j in range(tokens) if j <= i and (window is None or i - j < window))


def attention_flops(a: Architecture, tokens: int) -> int:
    """Summed pair by pair: 2 x head_dim for the score and 2 x head_dim for the value, in every head, loop and layer."""
    pairs = {"full": visible_pairs(tokens, None), "cross": visible_pairs(tokens, None)}
    if a.window:
        pairs["sliding"] = visible_pairs(tokens, a.window)
    streams, prefix = (a.parallel.streams, a.parallel.prefix_tokens) if a.parallel else (1, 0)
    total = 0
    for stage in a.stages:
        if stage.attention == "retention":
            per_head = tokens * 2 * (2 * a.head_dim * a.head_dim)
        else:
            per_head = (pairs[stage.attention] + tokens * prefix) * 2 * (2 * a.head_dim)
        total += stage.layers * stage.loops * streams * a.num_attention_heads * per_head
    return total


ARCHITECTURES = {name: preset(name, "test") for name in STAGES} | VARIANTS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_flops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's count of the products with weights, plus the attention products summed over the visible pairs."""
    a = ARCHITECTURES[name]
    model = model_of(a)
    grouped = []  # torch has no formula for these
    product = torch.nn.functional.grouped_mm

    def counted(x: torch.Tensor, experts: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        grouped.append(2 * x.shape[0] * experts.shape[1] * experts.shape[2])
        return product(x, experts, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    for tokens in (5, 21):
        grouped.clear()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randint(0, a.vocab_size, (1, tokens)), use_cache=False)
        counts = counter.get_flop_counts()["Global"]
        weights = sum(flops for op, flops in counts.items() if str(op) == "aten.mm") + sum(grouped)
        assert forward_flops(a, tokens) * tokens == pytest.approx(weights + attention_flops(a, tokens), rel=1e-12)


@pytest.mark.parametrize("name", ["transformer", "universal_transformer", "yoco_u"])
def test_attention_flops_against_unmasked_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of the whole row makes every layer causal; the plain formula multiplies all N keys, we count (N + 1) / 2."""
    tokens = 12
    a = preset(name, "test", **({"window": 12} if name == "yoco_u" else {}))
    model = model_of(a)
    monkeypatch.setattr("yoco_u.model.backend.runs_blockwise", lambda *_: False)  # torch counts only its own operators
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, a.vocab_size, (1, tokens)), use_cache=False)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    causal = counts["aten.bmm"] * (tokens + 1) / 2 / tokens
    assert forward_flops(a, tokens) * tokens == pytest.approx(counts["aten.mm"] + causal, rel=1e-12)


def test_flops_follow_from_loops_and_training() -> None:
    a = preset("yoco_u", "100m", loops=1)
    per_loop = forward_flops(a.with_loops(2), 512) - forward_flops(a, 512)
    assert forward_flops(a.with_loops(7), 512) == pytest.approx(forward_flops(a, 512) + 6 * per_loop)
    assert forward_flops(a, 512) == forward_flops(preset("yoco", "100m"), 512)
    assert training_flops(a, 512) == 3 * forward_flops(a, 512)


@pytest.mark.parametrize("tokens", [5, 21])
@pytest.mark.parametrize("name", ["transformer", "yoco", "yoco_u", "upper_loop", "retention", "streams"])
def test_prefill_flops(name: str, tokens: int) -> None:
    """Weights as torch counts them when only the last logits are asked for, and the attention products pair by pair."""
    a = ARCHITECTURES[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model_of(a)(torch.randint(0, a.vocab_size, (1, tokens)), use_cache=False, logits_to_keep=1)
    weights = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    crossing = [stage for stage in a.stages if stage.attention == "cross"]
    per_pair = 4 * a.num_attention_heads * a.head_dim
    skipped = sum(s.layers * s.loops for s in crossing) * per_pair * (visible_pairs(tokens, None) - tokens)
    assert prefill_flops(a, tokens) == pytest.approx(weights + attention_flops(a, tokens) - skipped, rel=1e-12)


@pytest.mark.parametrize("context", [1, 5, 21])
@pytest.mark.parametrize("name", ["transformer", "yoco", "yoco_u", "rins", "upper_loop", "gated", "retention", "streams"])
def test_decode_flops(name: str, context: int) -> None:
    """Weights as torch counts them for one token behind a cache, and the products with the keys that this token sees."""
    a = ARCHITECTURES[name]
    model, cache = model_of(a), YocoUCache(a)
    ids = torch.randint(0, a.vocab_size, (1, context))
    with torch.no_grad():
        if context > 1:
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    weights = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    products = attention_flops(a, context) - (attention_flops(a, context - 1) if context > 1 else 0)
    assert decode_flops(a, context) == pytest.approx(weights + products, rel=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefill_is_its_tokens_one_by_one_without_what_only_new_tokens_need(name: str) -> None:
    """Where nothing exits early, all but the last token save the LM head, and the mixing of streams."""
    a, context = ARCHITECTURES[name], 21
    spared = 2 * a.vocab_size * a.hidden_size
    if a.parallel:
        spared += 2 * a.parallel.streams * a.hidden_size * (a.hidden_size + 1)
    one_by_one = sum(decode_flops(a, i) for i in range(1, context + 1)) - (context - 1) * spared
    if a.has_global_kv:
        assert prefill_flops(a, context) < one_by_one
    else:
        assert prefill_flops(a, context) == pytest.approx(one_by_one, rel=1e-12)
    assert prefill_flops(a, 1) == pytest.approx(decode_flops(a, 1), rel=1e-12)


def test_prefill_bytes_by_hand() -> None:
    """The `test` size, as in `test_decode_bytes_by_hand`."""
    full, cross, head, global_kv, row = 32 * 96 + 3 * 32 * 48, 32 * 64 + 3 * 32 * 48, 96 * 32, 32 * 2 * 16, 2 * 16
    assert prefill_bytes(preset("transformer", "test"), 20) == 2 * (4 * full + head) + 2 * 4 * 20 * row
    written, read = 20 + 6 * 8, 2 * 20
    yoco_u = prefill_bytes(preset("yoco_u", "test", loops=3), 20, bytes_per_weight=1, bytes_per_element=4)
    assert yoco_u == 6 * full + 2 * cross + head + global_kv + 4 * (written + read) * row
    experts = VARIANTS["experts"]
    per_expert = 3 * 32 * 16
    many, alone = (prefill_bytes(experts, n, bytes_per_weight=1, bytes_per_element=0) for n in (10_000, 1))
    assert many - alone == pytest.approx((6 - 2) * per_expert * 2 * 3)  # the looped layers alone: one token crosses


def test_decode_bytes_by_hand() -> None:
    """The `test` size: 4 layers of hidden size 32, feed-forward 48, 4 heads and 2 KV heads of 8, window 8, vocabulary 96."""
    projections, feed_forward, row = 32 * (2 * 32 + 2 * 16), 3 * 32 * 48, 2 * 16
    head, global_kv = 96 * 32, 32 * 2 * 16
    full = projections + feed_forward
    cross = 32 * 2 * 32 + feed_forward
    transformer, yoco_u = preset("transformer", "test"), preset("yoco_u", "test", loops=3)
    assert decode_bytes(transformer, 20) == 2 * (4 * full + head) + 2 * 4 * 20 * row
    assert decode_bytes(transformer, 20, batch=5, bytes_per_weight=1) == 4 * full + head + 5 * 2 * 4 * 20 * row
    assert decode_bytes(yoco_u, 20) == 2 * (6 * full + 2 * cross + head + global_kv) + 2 * (6 * 8 + 2 * 20) * row
    assert decode_bytes(yoco_u, 3, bytes_per_weight=0, bytes_per_element=4) == 4 * (6 * 3 + 2 * 3) * row
    upper = preset("upper_loop", "test", loops=3)
    assert decode_bytes(upper, 20, bytes_per_weight=0) == 2 * (2 * 8 + 6 * 20) * row
    states = decode_bytes(preset("yoco_retention", "test"), 20, batch=2, bytes_per_weight=0) - 2 * 2 * 2 * 20 * row
    assert states == 2 * 2 * 4 * 8 * 8 * 4
    streams = preset("parscale", "test", streams=3, prefix_tokens=5)
    assert decode_bytes(streams, 20, bytes_per_weight=0) == 2 * 3 * 4 * (20 + 5) * row


def test_decode_reads_the_experts_that_a_batch_visits() -> None:
    a = VARIANTS["experts"]
    per_expert = 3 * 32 * 16 * sum(stage.layers * stage.loops for stage in a.stages)
    alone, crowd = (decode_bytes(a, 9, batch=n, bytes_per_weight=1, bytes_per_element=0) for n in (1, 10_000))
    assert crowd - alone == pytest.approx((6 - 2) * per_expert)
    draws = torch.stack([torch.randperm(6)[:2] for _ in range(3 * 4000)]).view(4000, -1)
    visited = sum(len(set(row.tolist())) for row in draws) / 4000
    three = decode_bytes(a, 9, batch=3, bytes_per_weight=1, bytes_per_element=0)
    assert (three - alone) / per_expert == pytest.approx(visited - 2, abs=0.1)


@pytest.mark.parametrize("context", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_mean_visible_keys(context: int, window: int | None) -> None:
    assert mean_visible_keys(context, window) == pytest.approx(visible_pairs(context, window) / context)


@pytest.mark.parametrize("context", KV_MEBIBYTES)
def test_kv_bytes_of_the_paper(context: int) -> None:
    for name, mebibytes in KV_MEBIBYTES[context].items():
        assert kv_bytes(preset(name, "1.3b"), context) == mebibytes * 2**20


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kv_bytes_of_a_real_cache(name: str) -> None:
    a = ARCHITECTURES[name]
    model = model_of(a).to(torch.bfloat16)
    for tokens in (1, 7, 8, 30):
        cache = YocoUCache(a)
        with torch.no_grad():
            model(torch.randint(0, a.vocab_size, (1, tokens)), past_key_values=cache, use_cache=True)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        # Between steps transformers keeps window - 1 rows a sliding slot: the row of the next token comes with that token.
        slots = sum(stage.layers * stage.loops for stage in a.stages if stage.attention == "sliding")
        missing = slots if a.window is not None and tokens >= a.window else 0
        assert kv_bytes(a, tokens) == held + missing * 2 * a.num_key_value_heads * a.head_dim * 2


def test_optimizer_bytes_of_a_real_optimizer() -> None:
    a = ARCHITECTURES["yoco_u"]
    model = model_of(a).train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[3, 5]]), labels=torch.tensor([[3, 5]]), use_cache=False).loss.backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    assert optimizer_bytes(a) == moments + sum(p.nbytes + p.grad.nbytes for p in model.parameters())
