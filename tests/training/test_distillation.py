"""Runs that begin with a saved model and learn from a teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_resume import assert_same_run, unfinished_copy
from training_runs import losses, run_config, train_on_ranks

from yoco_u.budget import forward_flops, training_flops
from yoco_u.config import parse
from yoco_u.data import DataConfig, prepare
from yoco_u.errors import UserError
from yoco_u.loading import load_model, with_architectures
from yoco_u.model import YocoUConfig, YocoUForCausalLM, save_model
from yoco_u.training import RunConfig, read_metrics, train
from yoco_u.training.distillation import LayerLoss, LogitLoss, freeze
from yoco_u.training.distributed import Distributed
from yoco_u.training.starting import check_start

CPU = torch.device("cpu")


class AllHere(Distributed):
    """One of several processes, whose first one is this process too."""

    def on_main(self, function: Callable[[], Any]) -> Any:
        return function()


@pytest.fixture(scope="module")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformer that was trained on the dataset."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(run_config(dataset, "transformer", steps=30, evaluate_every=30, save_every=30), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's blocks as a YOCO-U of two loops with closed gates, whose global KVs are those of its first cross layer."""
    source, tokenizer = load_model(teacher, CPU)
    own = source.model.architecture.model_dump() | {
        "stages": [{"attention": "sliding", "layers": 2, "loops": 2, "loop_gate": 0.0}, {"attention": "cross", "layers": 2}],
        "window": 12, "rope_cross": True,
    }  # fmt: skip
    model = YocoUForCausalLM(YocoUConfig(**own, bos_token_id=0, eos_token_id=0))
    given = source.state_dict()
    renamed = {
        name: given[name.replace("stages.1.layers.0", "stages.0.layers.2").replace("stages.1.layers.1", "stages.0.layers.3")]
        for name in model.state_dict()
        if "global_kv" not in name and "gates" not in name
    }
    first = "model.stages.0.layers.2"
    renamed |= {f"model.global_kv.{name}.weight": given[f"{first}.attn.{name}.weight"] for name in ("k_proj", "v_proj")}
    renamed["model.global_kv.norm.weight"] = given[f"{first}.attn_norm.weight"]
    model.load_state_dict(renamed, strict=False)
    folder = tmp_path_factory.mktemp("student") / "model"
    save_model(model, tokenizer, folder)
    return folder


def healing(
    dataset: Path, student: Path, teacher: Path | None, distillation: dict[str, Any] | None = None, **training: Any
) -> RunConfig:
    plain = run_config(dataset, **training).model_dump()
    del plain["architecture"]
    if teacher is not None:
        plain["distillation"] = {"teacher": str(teacher)} | (distillation or {})
    return parse(RunConfig, with_architectures(plain | {"start_from": str(student)}), "test")


def batch(length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(300, (2, length + 1), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(length)[None] >= torch.tensor([[9], [length]])).long()
    return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "document_ids": documents}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_logit_loss_is_the_divergence_from_the_teacher(dataset: Path, student: Path, teacher: Path, share: float) -> None:
    config = healing(dataset, student, teacher, {"share": share, "top_k": 300})
    model, other = load_model(student, CPU)[0], load_model(teacher, CPU)[0]
    assert config.distillation is not None
    part = batch()
    found = LogitLoss(model, other, config.distillation, CPU, "float32")(part, None)
    inputs = {name: part[name] for name in ("input_ids", "document_ids")}
    logits = model(**inputs).logits.flatten(0, 1)
    with torch.no_grad():
        expected = other(**inputs).logits.flatten(0, 1).log_softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    wanted = share * divergence + (1 - share) * F.cross_entropy(logits, part["shift_labels"].flatten())
    torch.testing.assert_close(found, wanted)


def test_layer_loss_compares_each_block_on_the_teachers_own_states(student: Path, teacher: Path) -> None:
    model, other = load_model(student, CPU)[0], load_model(teacher, CPU)[0]
    part = batch()
    found = LayerLoss(model, other, "float32")(part, None)
    states: list[torch.Tensor] = []
    for block in other.model.stages[0].layers:
        block.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    ends: list[torch.Tensor] = []
    other.model.stages[0].layers[3].register_forward_hook(lambda _, given, out: ends.append(out[0]))
    inputs = {name: part[name] for name in ("input_ids", "document_ids")}
    with torch.no_grad():
        other.model(**inputs)
        given = [*states[2:], ends[0]]
        changes = []
        for number in (0, 1):
            block = model.model.stages[1].layers[number]
            handle = block.register_forward_pre_hook(lambda _, a, x=given[number]: (x, *a[1:]))
            out: list[torch.Tensor] = []
            second = block.register_forward_hook(lambda _, a, o, out=out: out.append(o[0]))
            model.model(**inputs)
            handle.remove(), second.remove()
            difference = (out[0] - given[number + 1]).square().sum()
            changes.append(difference / (given[number + 1] - given[number]).square().sum())
    torch.testing.assert_close(found.detach(), torch.stack(changes).mean())
    assert min(changes) > 1e-3


def test_a_model_begins_as_the_saved_one_and_heals(dataset: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    before = healing(dataset, student, None, steps=1, optimizer_learning_rate=1e-12, optimizer_warmup_steps=0)
    untouched = train(before, tmp_path / "untouched", progress=False)
    healed = train(healing(dataset, student, teacher, steps=20, evaluate_every=20), tmp_path / "healed", progress=False)
    assert healed["validation"]["loss"] < untouched["validation"]["loss"]
    saved, again = load_file(student / "model.safetensors"), load_file(tmp_path / "untouched" / "model" / "model.safetensors")
    assert saved.keys() == again.keys()
    for name in saved:
        torch.testing.assert_close(saved[name], again[name], msg=name)


def test_layers_train_what_is_new_and_nothing_else(dataset: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    config = healing(dataset, student, teacher, {"stage": "layers"}, steps=15, evaluate_every=15)
    train(config, tmp_path / "run", progress=False)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.8 * found[0]
    before, after = load_file(student / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    new = {name for name in before if "global_kv" in name or ("stages.1" in name and ".attn" in name)}
    assert changed == new


def test_the_cross_decoder_alone_is_trained_by_the_same_gradients(
    dataset: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    names = {}
    for trains in ("all", "cross"):
        train(healing(dataset, student, teacher, {"trains": trains}, steps=3), tmp_path / trains, progress=False)
        before, after = load_file(student / "model.safetensors"), load_file(tmp_path / trains / "model" / "model.safetensors")
        names[trains] = {name for name in before if not torch.equal(before[name], after[name])}
    assert names["cross"] == {
        name for name in before if "stages.1" in name or "global_kv" in name or name == "model.norm.weight"
    }
    assert names["all"] > names["cross"]
    teaching = healing(dataset, student, teacher, {"trains": "cross"}).distillation
    found: dict[bool, dict[str, torch.Tensor]] = {}
    for frozen in (False, True):
        model, other = load_model(student, CPU)[0], load_model(teacher, CPU)[0]
        if frozen:
            freeze(model, teaching)
        assert teaching is not None
        LogitLoss(model, other, teaching, CPU, "float32")(batch(), None).backward()
        found[frozen] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[True].keys() == names["cross"]
    for name, gradient in found[True].items():
        assert torch.equal(gradient, found[False][name])


@pytest.mark.parametrize("teaching", [{"stage": "layers"}, {"stage": "logits"}, {"trains": "cross"}])
def test_it_continues_exactly(dataset: Path, student: Path, teacher: Path, tmp_path: Path, teaching: dict[str, Any]) -> None:
    config = healing(dataset, student, teacher, teaching, save_every=2, window_schedule=[{"until": 0.5, "window": 20}])
    train(config, tmp_path / "whole", progress=False)
    folder = unfinished_copy(tmp_path / "whole", tmp_path / "part", 2)
    train(config, folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")


def test_another_teacher_in_the_same_place_is_refused(dataset: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    """The run would end otherwise than one that was left alone."""
    shutil.copytree(teacher / "model", place := tmp_path / "teacher")
    config = healing(dataset, student, place, steps=4, save_every=2)
    train(config, tmp_path / "whole", progress=False)
    folder = unfinished_copy(tmp_path / "whole", tmp_path / "part", 2)
    model, tokenizer = load_model(place, CPU)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save_model(model, tokenizer, place)
    with pytest.raises(UserError, match="was begun with another teacher in the same place"):
        train(config, folder, progress=False)
    shutil.rmtree(place)
    shutil.copytree(teacher / "model", place)
    train(config, folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("start", [True, False])
def test_a_teacher_of_other_tokens_is_refused(dataset: Path, student: Path, teacher: Path, tmp_path: Path, start: bool) -> None:
    """Its vocabulary is as large, but its ids mean other texts."""
    shutil.copytree(teacher / "model", place := tmp_path / "teacher")
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    (place / "SHA256SUMS").unlink()
    plain = healing(dataset, student, place).model_dump()
    if not start:
        plain |= {"start_from": None, "architecture": plain["architecture"]}
    with pytest.raises(UserError, match=f"was prepared with another tokenizer than that of {place}"):
        train(parse(RunConfig, plain, "x"), tmp_path / "run", progress=False)


@pytest.mark.parametrize(("architecture", "stage", "processes", "message"), [
    ({"vocab_size": 301}, "logits", 1, "its vocab_size is 300, that of the run's model 301"),
    ({"hidden_size": 16}, "layers", 1, "its hidden_size is 32, that of the run's model 16; a teacher .* layers"),
    ({"layers": 6}, "layers", 1, "its number of layers is 4, that of the run's model 6"),
    ({}, "layers", 2, "runs in one process"),
    ({}, "logits", 3, "batch_rows 4 does not divide among 3 processes"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_beforehand(
    architecture: dict[str, Any], stage: str, processes: int, message: str, teacher: Path
) -> None:
    plain = run_config(Path("nowhere"), architecture=architecture).model_dump()
    config = parse(RunConfig, with_architectures(plain | {"distillation": {"teacher": str(teacher), "stage": stage}}), "test")
    with pytest.raises(UserError, match=message):
        check_start(config, AllHere(0, processes, 0, CPU))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(dataset: Path, student: Path, teacher: Path, tmp_path: Path, parallel: str) -> None:
    config = healing(dataset, student, teacher, steps=3, parallel=parallel, micro_batch_rows=2)
    train(config, tmp_path / "one", progress=False)
    train_on_ranks(config, tmp_path / "two", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_windows_by_schedule(dataset: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = YocoUForCausalLM.forward

    def watch(self: YocoUForCausalLM, *args: Any, **kwargs: Any) -> Any:
        seen.append((self.training, self.model.architecture.window))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(YocoUForCausalLM, "forward", watch)
    schedule = [{"until": 0.5, "window": 24}, {"until": 0.75, "window": 16}]
    config = healing(dataset, student, None, steps=4, evaluate_every=4, window_schedule=schedule)
    train(config, tmp_path / "run", progress=False)
    assert [window for training, window in seen if training] == [24, 24, 16, 12]
    assert {window for training, window in seen if not training} == {12}


def test_rotary_positions_of_the_cross_decoder_fade(
    dataset: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = YocoUForCausalLM.forward

    def watch(self: YocoUForCausalLM, *args: Any, **kwargs: Any) -> Any:
        own = {self.model.global_kv.rope, *(block.attn.rope for block in self.model.stages[1].layers)}
        seen.append((self.training, own.pop() and self.model.cross_rotation))
        assert not own
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(YocoUForCausalLM, "forward", watch)
    plain = healing(dataset, student, None, steps=6, evaluate_every=6).model_dump()
    fading = plain | {"training": plain["training"] | {"rope_cross_fades": 0.6}}
    with pytest.raises(UserError, match="needs a cross-decoder that ends without rotary positions"):
        parse(RunConfig, fading, "x")
    without = fading | {"architecture": plain["architecture"] | {"rope_cross": False}}
    train(parse(RunConfig, without, "x"), tmp_path / "run", progress=False)
    assert [share for training, share in seen if training] == [1, 0.75, 0.5, 0.25, False, False]
    assert {share for training, share in seen if not training} == {False}
    assert not load_model(tmp_path / "run", CPU)[0].model.architecture.rope_cross


def test_flops_count_the_teacher(dataset: Path, student: Path, teacher: Path) -> None:
    logits = healing(dataset, student, teacher, steps=5)
    layers = healing(dataset, student, teacher, {"stage": "layers"}, steps=5)
    half = healing(dataset, student, teacher, {"trains": "cross"}, steps=5)
    own, theirs = logits.architecture, load_model(teacher, CPU)[0].model.architecture
    tokens = 5 * 4 * 24
    assert logits.training_flops() == pytest.approx(tokens * (training_flops(own, 24) + forward_flops(theirs, 24)))
    weights = 2 * (32 * 32 * 2 + 3 * 32 * 48)  # of one block without keys and values, times two, as for all products below
    products, kvs, head = 4 * 32, 2 * 32 * 32, 2 * 32 * 300
    full = 4 * (weights + kvs + products * 12.5)
    sliding = 2 * 2 * (weights + kvs + products * (12 * 6.5 + 12 * 12) / 24)
    cross = 2 * (weights + products * 12.5) + kvs
    assert forward_flops(theirs, 24) == pytest.approx(full + head)
    assert layers.training_flops() == pytest.approx(tokens * (full + sliding + 3 * cross))
    assert half.training_flops() == pytest.approx(tokens * (full + head + sliding + 3 * cross + 2 * head))


def test_what_does_not_fit_is_refused(dataset: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}():\n    return {number}\n" * 100)
    data = DataConfig(corpus=f"{tmp_path}/[0-5].txt", validation_corpus=f"{tmp_path}/[6-8].txt", vocab_size=280)
    prepare(data, tmp_path / "other", progress=False)
    cases: dict[str, Any] = {
        "another tokenizer": healing(tmp_path / "other", student, teacher),
        "4 full": healing(dataset, student, teacher, {"stage": "layers"}),
    }
    plain = cases["4 full"].model_dump()
    deeper = dict(plain["architecture"], stages=[{"attention": "sliding", "layers": 3}, {"attention": "cross", "layers": 2}])
    wider = dict(plain["architecture"], global_kvs=2)
    for architecture, said in ((deeper, "convert it first"), (wider, "global_kv")):
        with pytest.raises(UserError, match=said):
            train(parse(RunConfig, plain | {"architecture": architecture}, "x"), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="was prepared with another tokenizer"):
        train(cases["another tokenizer"], tmp_path / "run", progress=False)
    shutil.copytree(teacher / "model", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        healing(dataset, student, tmp_path / "damaged")
    with pytest.raises(UserError, match="the architecture has none"):
        parse(RunConfig, plain | {"architecture": plain["distillation"]["architecture"]}, "x")
    with pytest.raises(UserError, match=r"checkpoint_stages 1 is the cross-decoder"):
        parse(RunConfig, plain | {"training": plain["training"] | {"checkpoint_stages": [1]}}, "x")
    tied = plain | {"architecture": plain["architecture"] | {"tie_word_embeddings": True}}
    with pytest.raises(UserError, match="has an LM head that is not its embedding"):
        train(parse(RunConfig, tied, "x"), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"training\.compile on cannot be had with distillation\.stage layers"):
        parse(RunConfig, plain | {"training": plain["training"] | {"compile": "on"}}, "x")


def test_figures_of_a_teacher_are_no_perplexity(dataset: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    train(
        healing(dataset, student, teacher, steps=2, evaluate_every=2, optimizer_warmup_steps=1),
        tmp_path / "run",
        progress=False,
    )
    for record in read_metrics(tmp_path / "run"):
        assert ("perplexity" in record) == (record["kind"] == "evaluation")
