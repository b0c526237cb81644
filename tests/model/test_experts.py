"""The mixture of experts: dropless, balanced with a bias or a loss, also inside the loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EXPERTS, architecture, assert_same_gradients, build, gradients, tokens
from torch import nn

from yoco_u import YocoUForCausalLM
from yoco_u.model.blocks import Block
from yoco_u.model.feed_forward import ExpertMixture, traced_grouped_product


def make(name: str = "yoco_u", **experts: Any) -> YocoUForCausalLM:
    return build(architecture(name, experts=EXPERTS | experts))


def mixtures(model: nn.Module) -> list[ExpertMixture]:
    return [module for module in model.modules() if isinstance(module, ExpertMixture)]


def test_no_token_is_dropped_however_uneven_the_load() -> None:
    """All tokens visit the same experts, the most uneven load there is; each gets what it gets alone."""
    model = make()
    for mixture in mixtures(model):
        mixture.choice_bias[:3] = 10
    model.train()
    ids = tokens(4, 25)
    with torch.no_grad():
        together = model(ids).logits
        for mixture in mixtures(model):
            visits = mixture.tokens_per_expert
            loops = 3 if mixture in mixtures(model.model.stages[0]) else 1
            assert visits.tolist() == [100 * loops] * 3 + [0] * 5
        for row in range(4):
            torch.testing.assert_close(model(ids[row : row + 1]).logits, together[row : row + 1], rtol=1e-4, atol=1e-4)


def test_every_expert_learns_from_its_tokens_only() -> None:
    mixture = mixtures(make())[0]
    mixture.choice_bias[5:] = -10
    x = torch.randn(20, 32)
    out, _ = mixture(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), mixture.gate_up_proj)
    assert (gradient[5:] == 0).all()
    assert (gradient[:5].flatten(1).abs().sum(1) > 0).all()


def test_the_router_is_float32_under_autocast() -> None:
    """Scores that differ by less than bfloat16 can tell still choose the right expert."""
    mixture = mixtures(make(experts_per_token=1))[0]
    mixture.choice_bias.zero_()
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[2, 0], mixture.router.weight[6, 0] = 1.0, 1.0 + 2**-12
    chosen = []
    mixture.shared = None
    x = torch.zeros(5, 32)
    x[:, 0] = 1
    mixture.train()
    with torch.autocast("cpu", torch.bfloat16):
        mixture(x)
    chosen = mixture.tokens_per_expert
    assert chosen.tolist() == [0, 0, 0, 0, 0, 0, 5, 0]


def test_the_bias_moves_the_load_towards_even() -> None:
    """A router that prefers some experts, and no gradient: the bias alone evens the load out."""
    mixture = make(bias_update_rate=0.02)
    mixture = mixtures(mixture)[0].train()
    mixture.choice_bias.zero_()
    x = torch.randn(512, 32) + 0.5

    def spread() -> float:
        mixture.tokens_per_expert.zero_()
        with torch.no_grad():
            mixture(x)
        return float(mixture.tokens_per_expert.max() / mixture.tokens_per_expert.double().mean())

    before = spread()
    for _ in range(200):
        mixture.balance()
        assert (mixture.tokens_per_expert == 0).all()
        spread()
    assert before > 1.8
    assert spread() < 1.15


def test_one_step_of_the_bias() -> None:
    mixture = mixtures(make(bias_update_rate=0.5))[0]
    mixture.choice_bias.zero_()
    mixture.tokens_per_expert.copy_(torch.tensor([8, 0, 4, 4, 4, 4, 7, 1]))
    mixture.balance()
    assert mixture.choice_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, -0.5, 0.5]


def test_the_bias_changes_the_choice_but_not_the_weights() -> None:
    mixture = mixtures(make())[0]
    mixture.choice_bias.zero_()
    x = torch.randn(30, 32)
    expected, _ = mixture(x)
    mixture.choice_bias.fill_(3.0)
    torch.testing.assert_close(mixture(x)[0], expected)


def test_auxiliary_loss_against_the_formula() -> None:
    """alpha E sum_e f_e P_e: f the share of visits, P the mean share of the score (arXiv 2101.03961, eq. 4)."""
    mixture = mixtures(make(auxiliary_loss_weight=0.1))[0].train()
    x = torch.randn(17, 32)
    _, loss = mixture(x)
    visits, shares = [0.0] * 8, [0.0] * 8
    for row in x:
        scores = [1 / (1 + 2.718281828459045 ** -float(w @ row)) for w in mixture.router.weight.detach()]
        biased = [s + float(b) for s, b in zip(scores, mixture.choice_bias, strict=True)]
        for e in sorted(range(8), key=lambda e: -biased[e])[:3]:
            visits[e] += 1 / (17 * 3)
        for e in range(8):
            shares[e] += scores[e] / sum(scores) / 17
    expected = 0.1 * 8 * sum(f * p for f, p in zip(visits, shares, strict=True))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert mixture.eval()(x)[1] is None


def test_the_models_loss_is_that_of_the_tokens_plus_that_of_every_visit() -> None:
    """Inside the loop each of T visits counts; in evaluation only the tokens do."""
    model = make(auxiliary_loss_weight=0.1).train()
    ids = tokens(2, 20)
    seen: list[torch.Tensor] = []
    for mixture in mixtures(model):
        mixture.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    training = model(ids, labels=ids).loss
    assert len(seen) == 2 * 3 + 2
    evaluated = model.eval()(ids, labels=ids).loss
    torch.testing.assert_close(training, evaluated + sum(seen[:8]))
    routers = {n: g for n, g in gradients(model, training).items() if "router" in n}
    assert all(g.abs().max() > 0 for g in routers.values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_neither_gradients_nor_the_balance() -> None:
    """Blocks run twice then, so counts are twice as large for all experts alike."""
    shares, grads = [], []
    for checkpointing in (False, True):
        model = make(auxiliary_loss_weight=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(2, 20)
        grads.append(gradients(model, model(ids, labels=ids).loss))
        counts = torch.stack([mixture.tokens_per_expert for mixture in mixtures(model)])
        shares.append(counts / counts.sum(1, keepdim=True))
        for mixture in mixtures(model):
            mixture.balance()
    assert_same_gradients(grads[1], grads[0])
    assert torch.equal(*shares)


def test_counts_are_exact_and_the_bias_is_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    """bfloat16 counts would stop growing at 256, and a bias of 0.3 would not notice a step of 0.001."""
    make().save_pretrained(tmp_path)
    model = YocoUForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    with torch.no_grad():
        for _ in range(20):
            model(tokens(4, 50))
    mixture = mixtures(model.model.stages[1])[0]
    assert int(mixture.tokens_per_expert.sum()) == 20 * 200 * 3
    mixture.choice_bias.fill_(0.3)
    mixture.tokens_per_expert.zero_()
    mixture.tokens_per_expert[0] = 1
    mixture.balance()
    assert mixture.choice_bias[0].item() == pytest.approx(0.299)
    assert mixture.router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["yoco_u", "upper_loop", "rins", "parscale", "yoco_retention"])
def test_training_steps_on_every_kind_of_stage(name: str) -> None:
    model = make(name, auxiliary_loss_weight=0.01).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = tokens(4, 20)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for mixture in mixtures(model):
            mixture.balance()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_micro_batches_weigh_the_auxiliary_loss_by_their_targets() -> None:
    """As trainers ask for: each loss is divided by the targets of all micro-batches, and the losses are added."""
    model, parts = make(auxiliary_loss_weight=0.1).train(), [tokens(1, 9, seed=1), tokens(2, 14, seed=2), tokens(1, 5, seed=3)]
    seen: list[torch.Tensor] = []
    for mixture in mixtures(model):
        mixture.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    counts = [part[:, 1:].numel() for part in parts]
    expected = torch.zeros(())
    for part, count in zip(parts, counts, strict=True):
        seen.clear()
        logits = model(part).logits
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        expected = expected + (entropy + sum(seen)) * count / sum(counts)
    expected_gradients = gradients(model, expected)
    for return_logits in (True, False):
        call = {"num_items_in_batch": torch.tensor(sum(counts)), "return_logits": return_logits}
        found = sum(model(part, labels=part, **call).loss for part in parts)
        torch.testing.assert_close(found, expected)
        assert_same_gradients(gradients(model, found), expected_gradients, 1e-4)


class Wrapper(nn.Module):
    """Stands for PEFT's wrapper of parameters: another class, which only calls the layer that it holds."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(x, *args, **kwargs)


def test_a_wrapped_mixture_and_a_wrapped_head_compute_the_same() -> None:
    model, ids = make(auxiliary_loss_weight=0.1).train(), tokens(2, 20)
    call = {"labels": ids, "use_cache": False}
    expected = model(ids, **call)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.mlp = Wrapper(block.mlp)
    model.lm_head = Wrapper(model.lm_head)
    wrapped = model(ids, **call)
    assert torch.equal(wrapped.logits, expected.logits) and torch.equal(wrapped.loss, expected.loss)
    torch.testing.assert_close(model(ids, **call, return_logits=False).loss, expected.loss)


def test_the_loss_without_logits_sees_what_a_head_adds_to_its_weight() -> None:
    """As LoRA does: the wrapped layer has the weight of the old one, and computes more than its product."""
    model, ids = make().eval(), tokens(2, 20)
    low_rank = torch.randn(96, 32) * 0.1

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x @ low_rank.T

    weight = model.lm_head.weight
    model.lm_head = Adapted(32, 96, bias=False)
    model.lm_head.weight = weight
    losses = [model(ids, labels=ids, return_logits=return_logits).loss for return_logits in (True, False)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_traced_product_is_the_grouped_product(dtype: torch.dtype) -> None:
    """Values and gradients, of loads that leave experts without a token."""
    x, weights = torch.randn(24, 32, dtype=dtype), torch.randn(8, 32, 16, dtype=dtype)
    ends = torch.tensor([0, 3, 3, 10, 20, 20, 21, 24], dtype=torch.int32)
    outputs = []
    for product in (F.grouped_mm, traced_grouped_product):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = product(*inputs, offs=ends) if product is F.grouped_mm else product(*inputs, ends)
        outputs.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.library.opcheck(traced_grouped_product, (x.requires_grad_(), weights.requires_grad_(), ends))
