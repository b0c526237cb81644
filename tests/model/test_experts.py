"""The mixture of experts: dropless, balanced with a bias or a loss, also inside the loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import EXPERTS, architecture, assert_same_gradients, build, gradients, tokens
from torch import nn

from yoco_u import YocoUForCausalLM
from yoco_u.model.feed_forward import ExpertMixture


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
