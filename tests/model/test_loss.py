"""The loss in chunks against torch's cross-entropy of all logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import EXPERTS, architecture, assert_same_gradients, build, gradients, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoco_u.errors import UserError
from yoco_u.model import loss
from yoco_u.model.loss import SoftTargets, chunked_cross_entropy


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, items: Any) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, -2)
    if items is None:
        return F.cross_entropy(logits, targets.flatten())
    return F.cross_entropy(logits, targets.flatten(), reduction="sum") / items


@given(
    seed=st.integers(0, 2**32), rows=st.integers(1, 3), length=st.integers(1, 9), vocab=st.integers(1, 20),
    tokens_at_a_time=st.integers(1, 30), ignored=st.floats(0, 0.9), items=st.sampled_from([None, 7, torch.tensor(3)]),
)  # fmt: skip
def test_value_and_gradients(
    seed: int, rows: int, length: int, vocab: int, tokens_at_a_time: int, ignored: float, items: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    make: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    hidden, weight = torch.randn(rows, length, 5, **make).requires_grad_(), torch.randn(vocab, 5, **make).requires_grad_()
    targets = torch.randint(vocab, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < ignored] = -100
    targets[0, 0] = 0  # the mean over no targets is not a number, as in torch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS", tokens_at_a_time * vocab)
        found = chunked_cross_entropy(hidden, weight, targets, items)
    expected = whole(hidden, weight, targets, items)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(3 * x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_ignored_tokens_may_be_anything() -> None:
    """An infinite state without a target leaves loss and gradients finite."""
    hidden = torch.randn(4, 5)
    hidden[2] = torch.inf
    hidden, weight = hidden.requires_grad_(), torch.randn(7, 5, requires_grad=True)
    found = chunked_cross_entropy(hidden, weight, torch.tensor([1, 2, -100, 3]))
    assert found.isfinite()
    (gradient,) = torch.autograd.grad(found, hidden)
    assert gradient[[0, 1, 3]].isfinite().all() and (gradient[[0, 1, 3]] != 0).all()


def test_no_targets_is_not_a_number() -> None:
    assert chunked_cross_entropy(torch.randn(2, 5), torch.randn(7, 5), torch.full((2,), -100)).isnan()


def test_the_weights_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in bfloat16, whose gradients all point the same way, so that a sum in bfloat16 would stop growing."""
    monkeypatch.setattr(loss, "LOGITS", 2)
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    total = chunked_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.long), 1)
    (gradient,) = torch.autograd.grad(total, weight)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.tensor([[-1000.0], [1000.0]]))


def test_autocast() -> None:
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (30,))
    expected = whole(hidden, weight, targets, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


SETTINGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "experts": {"experts": EXPERTS | {"auxiliary_loss_weight": 0.1}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_model_without_logits(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS", 96 * 7)
    model, ids = build(architecture(layers=2, **settings)).train(), tokens(2, 20)
    labels = ids.masked_fill(torch.arange(20) < 5, -100)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    for call in ({"labels": labels}, {"shift_labels": shifted}, {"shift_labels": shifted, "num_items_in_batch": 9}):
        expected, found = (model(ids, use_cache=False, return_logits=keep, **call) for keep in (True, False))
        assert found.logits is None
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(model, found.loss), gradients(model, expected.loss), 1e-4)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
            return out

    monkeypatch.setattr(loss, "LOGITS", 96 * 64)
    model, ids = build(architecture()), tokens(2, 300)
    found = {}
    for keep in (True, False):
        with Largest() as largest:
            model(ids, shift_labels=ids, use_cache=False, return_logits=keep).loss.backward()
        found[keep] = largest.numel
    assert found[True] >= 600 * 96
    assert found[False] <= 600 * 48  # the feed-forward's


def test_no_logits_and_no_labels_is_refused() -> None:
    with pytest.raises(UserError, match="return_logits is False, and there are no labels"):
        build(architecture())(tokens(1, 3), return_logits=False)


def whole_distillation(logits: Tensor, targets: Tensor, soft: SoftTargets) -> Tensor:
    """The same from all logits at once: the teacher's other tokens, and the model's, are one token more."""
    own, likely = logits.log_softmax(-1), soft.log_probs.exp()
    picked = own.gather(-1, soft.ids)
    rest = (1 - likely.sum(-1, keepdim=True)).clamp_min(0)
    own_rest = 1 - picked.exp().sum(-1, keepdim=True)
    whole_teacher, whole_own = torch.cat([likely, rest], -1), torch.cat([picked, own_rest.log()], -1)
    divergence = torch.where(whole_teacher > 0, whole_teacher * (whole_teacher.log() - whole_own), 0).sum(-1)
    counted = targets != -100
    hard = F.cross_entropy(logits, targets, reduction="none")
    return ((1 - soft.share) * hard + soft.share * divergence)[counted].mean()


@given(
    seed=st.integers(0, 2**32), count=st.integers(1, 9), vocab=st.integers(3, 20), k=st.integers(1, 19),
    tokens_at_a_time=st.integers(1, 30), share=st.floats(0, 1),
)  # fmt: skip
def test_distillation(seed: int, count: int, vocab: int, k: int, tokens_at_a_time: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    make: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    hidden, weight = torch.randn(count, 5, **make).requires_grad_(), torch.randn(vocab, 5, **make).requires_grad_()
    teacher = torch.randn(count, vocab, **make).log_softmax(-1).topk(min(k, vocab - 1), dim=-1)
    soft = SoftTargets(teacher.indices, teacher.values, share)
    targets = torch.randint(vocab, (count,), generator=generator)
    targets[1::2] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS", tokens_at_a_time * vocab)
        found = chunked_cross_entropy(hidden, weight, targets, soft=soft)
    expected = whole_distillation(hidden @ weight.T, targets, soft)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(3 * x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@given(
    seed=st.integers(0, 2**32),
    sure=st.sampled_from([1.0, 30.0, 300.0, 3000.0]),
    teacher_sure=st.sampled_from([1.0, 30.0, 300.0]),
)
def test_distillation_of_models_that_are_sure(seed: int, sure: float, teacher_sure: float) -> None:
    """Where next to nothing is left for the other tokens, gradients are finite in float32, and those of float64."""
    generator = torch.Generator().manual_seed(seed)
    count, vocab, k = 6, 12, 4
    weight, hidden = torch.eye(vocab), sure * torch.randn(count, vocab, generator=generator)
    drawn = (teacher_sure * torch.randn(count, vocab, generator=generator)).log_softmax(-1)
    if seed % 2:
        drawn = hidden.log_softmax(-1)
    likely = drawn.topk(k, dim=-1)
    targets = torch.randint(vocab, (count,), generator=generator)
    hidden.requires_grad_()
    soft = SoftTargets(likely.indices, likely.values, 0.9)
    chunked_cross_entropy(hidden, weight, targets, soft=soft).backward()
    probabilities = hidden.detach().double().softmax(-1)
    others = torch.ones(count, vocab, dtype=torch.bool).scatter(-1, soft.ids, False)
    own_rest = hidden.detach().double().masked_fill(~others, -torch.inf).softmax(-1)
    known = likely.values.double().exp()
    teacher = ((1 - known.sum(-1, keepdim=True)).clamp_min(0) * own_rest).scatter(-1, soft.ids, known)
    expected = (probabilities - 0.9 * teacher - 0.1 * F.one_hot(targets, vocab)) / count
    assert hidden.grad is not None
    tolerance = 1e-6 * max(sure, teacher_sure)  # of float32's logits and log probabilities
    torch.testing.assert_close(hidden.grad.double(), expected, rtol=tolerance, atol=tolerance)
