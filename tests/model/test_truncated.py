"""Truncated backpropagation through the loops, and the loss of an earlier exit, against direct twins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from examples import covering
from models import architecture, assert_same_gradients, build, gradients, tokens
from torch import Tensor

from yoco_u import Stage, YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.model.blocks import LoopedStack
from yoco_u.model.cache import YocoUCache
from yoco_u.model.loss import EarlyExit
from yoco_u.training.parallelize import checkpoint_stages, truncate_backpropagation

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8 + [2] * 3, [0] * 16])


def inputs() -> dict[str, Any]:
    ids = tokens(2, 16)
    return {"input_ids": ids, "labels": ids, "document_ids": DOCUMENTS, "use_cache": False}


@contextmanager
def detached(model: YocoUForCausalLM, loops: int, last: int) -> Iterator[None]:
    """The twin: each looped stage runs all loops with gradients, and before the `last` loops what these have made of its input
    is a constant that is added to it."""
    run_loop = LoopedStack.run_loop
    begin: dict[LoopedStack, Tensor] = {}

    def run(self: LoopedStack, x: Tensor, backend: Any, loop: int, *rest: Any) -> Any:
        looped = model.model.architecture.stages[[*model.model.stages].index(self)].loops > 1
        if loop == 0:
            begin[self] = x
        if looped and loop == loops - last > 0:
            x = begin[self] + (x - begin[self]).detach()
        return run_loop(self, x, backend, loop, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopedStack, "run_loop", run)
        yield


@pytest.mark.parametrize(("case", "recomputed"), covering(
    [
        ("yoco_u", 3, 1), ("yoco_u", 5, 2), ("yoco_u", 2, 2), ("rins", 4, 2), ("universal_transformer", 3, 1),
        ("upper_loop", 4, 3),
    ],
    [False, True],
))  # fmt: skip
def test_gradients_are_those_of_states_detached_before_the_last_loops(case: tuple[str, int, int], recomputed: bool) -> None:
    name, loops, last = case
    model = build(architecture(name, loop_gate=0.3)).double().train()
    with detached(model, loops, last):
        twin = model(**inputs(), num_loops=loops).loss
        expected = gradients(model, twin)
    if recomputed:
        checkpoint_stages(model, tuple(range(len(model.model.stages))))
    truncate_backpropagation(model, last)
    loss = model(**inputs(), num_loops=loops).loss
    torch.testing.assert_close(loss, twin)
    assert_same_gradients(gradients(model, loss), expected, 1e-11)
    truncate_backpropagation(model, None)
    whole = gradients(model, model(**inputs(), num_loops=loops).loss)
    same = all(torch.allclose(whole[name], expected[name]) for name in whole)
    assert same == (loops <= last)


def test_every_parameter_has_a_gradient() -> None:
    """Those of the embedding too, which lies before the loop; and DDP waits for the gradient of every parameter."""
    model = build(architecture()).train()
    truncate_backpropagation(model, 1)
    model(**inputs(), num_loops=3).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_loops_without_gradients_keep_nothing() -> None:
    model = build(architecture()).train()
    truncate_backpropagation(model, 2)

    def kept(loops: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            model(**inputs(), num_loops=loops)
        return sum(sizes)

    assert kept(3) == kept(8) == pytest.approx(kept(2), rel=0.01)
    truncate_backpropagation(model, None)
    assert kept(8) > 2 * kept(3)


def test_outside_training_nothing_is_cut() -> None:
    model = build(architecture()).eval()
    whole = gradients(model, model(**inputs()).loss)
    truncate_backpropagation(model, 1)
    assert_same_gradients(gradients(model, model(**inputs()).loss), whole, 0)


@pytest.mark.parametrize(("case", "how"), covering(
    [
        ("yoco_u", {}), ("yoco_u", {"loop_gate": 0.3, "global_kvs": 2, "rope_cross": True}), ("rins", {}),
        ("universal_transformer", {}), ("yoco_u", {"tie_word_embeddings": True}),
    ],
    [(1, False), (3, True), (1, True), (3, False)],
))  # fmt: skip
def test_an_earlier_exit_learns_from_the_last_loop(case: tuple[str, dict[str, Any]], how: tuple[int, bool]) -> None:
    """The twin runs the whole model once with as many loops, and takes the divergence of its logits."""
    (name, settings), (loop, return_logits) = case, how
    model = build(architecture(name, **settings)).double().train()
    last, early = model(**inputs(), num_loops=4), model(**inputs(), num_loops=loop)
    expected, found = last.logits.detach().log_softmax(-1), early.logits.log_softmax(-1)
    counted = torch.cat([(DOCUMENTS.diff(dim=1) == 0), torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    divergence = (expected.exp() * (expected - found)).sum(-1)[counted].mean()
    twin = last.loss + 0.7 * divergence
    loss = model(**inputs(), num_loops=4, early_exit=EarlyExit(loop, 0.7), return_logits=return_logits).loss
    torch.testing.assert_close(loss, twin, rtol=1e-6, atol=0)  # transformers takes its loss in float32
    assert divergence > 1e-3
    assert_same_gradients(gradients(model, loss), gradients(model, twin), 1e-6)


@pytest.mark.parametrize("loop", [0, 3])
def test_an_exit_that_is_not_before_the_last_loop_is_refused(loop: int) -> None:
    with pytest.raises(UserError, match=f"exit_loop is {loop}; expected a loop before the last, which is 3"):
        build(architecture())(**inputs(), early_exit=EarlyExit(loop, 1.0))


@pytest.mark.parametrize(("name", "stages", "found"), [
    ("upper_loop", {"sliding": 1, "cross": 3}, "1 sliding, 1 cross x3"),
    ("yoco_u", {"sliding": 2, "full": 3, "cross": 1}, "1 sliding x2, 1 full x3, 1 cross"),
    ("parscale", {"full": 3}, "1 full x3 on parallel streams"),
])  # fmt: skip
def test_an_exit_needs_one_loop_before_the_cross_decoder(name: str, stages: dict[Any, int], found: str) -> None:
    looped = tuple(Stage(attention=attention, layers=1, loops=loops) for attention, loops in stages.items())
    with pytest.raises(UserError, match=f"exit_loop needs one looped stage.*; found {found}$"):
        build(architecture(name, stages=looped)).model(tokens(1, 4), exit_loop=1, logits_to_keep=1)


@pytest.mark.parametrize("name", ["yoco_u", "rins"])
def test_a_call_with_an_exit_has_no_cache_and_no_hidden_states(name: str) -> None:
    """They would be those of both exits."""
    model, exits = build(architecture(name)).eval(), {"early_exit": EarlyExit(1, 0.5)}
    call = inputs() | {"document_ids": None, "use_cache": None}
    found = model(**call, **exits)
    assert found.past_key_values is None
    assert float(found.loss) == float(model(**call | {"use_cache": False}, **exits).loss)
    for cache in ({"use_cache": True}, {"past_key_values": YocoUCache(model.model.architecture)}):
        with pytest.raises(UserError, match="exit_loop is 1, which goes with no cache"):
            model(**call | cache, **exits)
    with pytest.raises(UserError, match="exit_loop is 1, which goes without output_hidden_states"):
        model(**call, **exits, output_hidden_states=True)


@pytest.mark.parametrize(("loops", "last", "exit_loop"), [(4, 1, 2), (4, 1, 3), (3, 2, 1), (2, 1, 1), (4, 2, 3)])
def test_an_exit_before_the_last_loops_trains_what_follows_the_loop(loops: int, last: int, exit_loop: int) -> None:
    model = build(architecture()).double().train()
    truncate_backpropagation(model, last)
    both = gradients(model, model(**inputs(), num_loops=loops, early_exit=EarlyExit(exit_loop, 1.0)).loss)
    without = gradients(model, model(**inputs(), num_loops=loops).loss)
    changed = {name.removeprefix("model.") for name in both if not torch.equal(both[name], without[name])}
    behind = {name for name in changed if name.startswith(("stages.1.", "global_kv.", "norm.", "lm_head."))}
    assert any(name.startswith("stages.1.") for name in behind)
    assert (changed == behind) == (exit_loop <= loops - last)
