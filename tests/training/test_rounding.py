"""Quantization-aware training: passes multiply what `quantize` makes, and updates change the weights that it is made of."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import covering
from models import EXPERTS, architecture, assert_same_gradients, build, gradients, tokens
from safetensors.torch import load_file
from test_resume import assert_same_run, unfinished_copy
from torch import Tensor, nn
from training_runs import run_config, train_on_ranks

from yoco_u import YocoUForCausalLM
from yoco_u.config import parse
from yoco_u.data import BatchLoader, DatasetIndex, PackedDataset
from yoco_u.errors import UserError
from yoco_u.loading import load_model, with_architectures
from yoco_u.model.quantization import quantize
from yoco_u.training import RunConfig, evaluate, read_metrics, train
from yoco_u.training.distributed import Distributed
from yoco_u.training.optimizer import build_optimizer, learning_rate
from yoco_u.training.rounding import rounded_weights
from yoco_u.training.starting import first_model

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
VARIANTS: dict[str, dict[str, Any]] = {
    "yoco_u": {"num_key_value_heads": 1, "intermediate_size": 40},
    "tied": {"tie_word_embeddings": True, "loop_gate": 0.3},
    "experts": {"experts": EXPERTS, "qk_norm": True},
}
DIAL = {"loop_draw": {"most": 4}, "early_exit_weight": 0.5, "backward_loops": 2, "evaluate_loops": [1, 5]}


def plain_twin(model: YocoUForCausalLM, weights: Any) -> YocoUForCausalLM:
    """What `quantize` makes of the model, in plain tensors that have gradients."""
    twin = copy.deepcopy(model)
    quantize(twin, weights)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor:
            module.weight = nn.Parameter(module.weight.dequantize())
    return twin


@pytest.mark.parametrize(("variant", "weights"), covering(list(VARIANTS), ["int8", "int4"]))
def test_passes_are_those_of_the_quantized_model(variant: str, weights: Any) -> None:
    model = build(architecture("yoco_u", **VARIANTS[variant]))
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    quantized, ids = copy.deepcopy(model), tokens(2, 20)
    quantize(quantized, weights)
    plain = plain_twin(model, weights)
    expected = gradients(plain, plain(ids, labels=ids, num_loops=5).loss)
    head = expected.pop("lm_head.weight")  # the head of the twin is not tied any more
    expected["lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"] = (
        head if "lm_head.weight" in names else expected["model.embed_tokens.weight"] + head
    )
    with rounded_weights(model, weights):
        out = model(ids, labels=ids, num_loops=5)
        torch.testing.assert_close(out.logits, quantized(ids, num_loops=5).logits, rtol=1e-4, atol=2e-4)
        assert (out.logits - build(architecture("yoco_u", **VARIANTS[variant]))(ids, num_loops=5).logits).abs().max() > 1e-3
        for _ in range(2):  # as many passes as a step has micro-batches
            (model(ids, labels=ids, num_loops=5, return_logits=False).loss / 2).backward()
    assert [name for name, _ in model.named_parameters()] == names
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert_same_gradients(found, {name: expected[name] for name in found}, relative=1e-4)


def test_weights_come_back_after_an_error() -> None:
    model = build(architecture(**VARIANTS["tied"]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), rounded_weights(model, "int4"):
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def directly_trained(config: RunConfig, steps: int) -> YocoUForCausalLM:
    """Gradients of a quantized copy, in plain tensors, given to the model's own weights in each step."""
    torch.manual_seed(config.training.seed)
    index = DatasetIndex.load(Path(config.dataset))
    model = first_model(config, index.eot_id, index.tokenizer)
    optimizer = build_optimizer(model, config.optimizer)
    loader = BatchLoader(PackedDataset(Path(config.dataset), "train", 24, config.training.seed), 4, 0, 1)
    for step in range(steps):
        twin = plain_twin(model, config.training.weights)
        twin(**loader.batch(step), use_cache=False).loss.backward()
        theirs = dict(twin.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.grad = theirs[name].grad
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.training.steps)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
    return model


def test_a_run_updates_the_weights_and_scores_the_rounded_ones(dataset: Path, tmp_path: Path) -> None:
    config = run_config(dataset, architecture={"loop_gate": 0.3}, steps=3, weights="int4", evaluate_loops=[1, 5])
    train(config, tmp_path / "run", progress=False)
    model, _ = load_model(tmp_path / "run", ALONE.device)
    expected = directly_trained(config, 3).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    quantize(model, "int4")
    rows = PackedDataset(dataset, "validation", 24, shuffle=False)
    last = read_metrics(tmp_path / "run")[-1]
    for key, loops in (("loss", 3), ("loss_at_1", 1), ("loss_at_5", 5)):
        assert last[key] == pytest.approx(evaluate(model, rows, 240, 4, ALONE, "float32", loops).loss, rel=1e-5)


def test_a_run_continues_exactly(dataset: Path, tmp_path: Path) -> None:
    config = run_config(
        dataset, architecture=VARIANTS["tied"], weights="int4", micro_batch_rows=2, checkpoint_stages=[0], **DIAL
    )
    train(config, tmp_path / "whole", progress=False)
    folder = unfinished_copy(tmp_path / "whole", tmp_path / "from-4", 4)
    train(config, folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize(("parallel", "variant"), [("ddp", "tied"), ("fsdp", "yoco_u")])
def test_two_processes_agree_with_one(parallel: str, variant: str, dataset: Path, tmp_path: Path) -> None:
    """Losses after the first step only nearly, since weights that lie half-way are rounded up here and down there.

    With an epsilon above all gradients an update is in proportion to its gradient, so that a last bit of it stays one.
    """
    config = run_config(
        dataset, architecture=VARIANTS[variant], weights="int4", parallel=parallel, steps=2, evaluate_every=1,
        micro_batch_rows=1, optimizer_warmup_steps=0, optimizer_eps=1.0, optimizer_learning_rate=0.3, **DIAL,
    )  # fmt: skip
    assert train_on_ranks(config, tmp_path / "two") == [0, 0]
    train(config, tmp_path / "one", progress=False)
    found, expected = (read_metrics(tmp_path / name) for name in ("two", "one"))
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    for key in ("loss", "loss_at_1", "loss_at_5"):
        there = [record[key] for record in expected if key in record]
        assert [record[key] for record in found if key in record] == pytest.approx(there, rel=5e-3)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[1].items():
        assert (weights[0][name] - weight).abs().max() < 2e-5, name


def test_a_saved_model_is_tuned_to_be_rounded(dataset: Path, tmp_path: Path) -> None:
    """A tied one may leave the tie, as quantized models do."""
    train(run_config(dataset, architecture=VARIANTS["tied"], steps=3), tmp_path / "before", progress=False)
    plain = run_config(dataset, steps=3, weights="int4", parallel="fsdp").model_dump()
    plain["architecture"] = {"tie_word_embeddings": False}
    config = parse(RunConfig, with_architectures(plain | {"start_from": str(tmp_path / "before")}), "test")
    train(config, tmp_path / "after", progress=False)
    before, after = (load_model(tmp_path / name, ALONE.device)[0] for name in ("before", "after"))
    assert before.lm_head.weight is before.model.embed_tokens.weight
    assert not torch.equal(after.lm_head.weight, after.model.embed_tokens.weight)
    torch.testing.assert_close(after.lm_head.weight, before.lm_head.weight, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "architecture", "message"),
    [
        ({"weights": "int3"}, {}, "training.weights"),
        (
            {"weights": "int4", "parallel": "fsdp"},
            {"tie_word_embeddings": True},
            "training.weights int4 rounds the LM head and not the embedding, which fsdp gathers as one matrix; set",
        ),
    ],
)
def test_impossible_settings(dataset: Path, settings: dict[str, Any], architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(dataset, architecture=architecture, **settings)


def test_missing_torchao(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"^quantized weights need torchao: pip install 'yoco-u\[quantization\]'$"):
        train(run_config(dataset, weights="int8"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
