"""The modelling files: in programs that have torch and transformers but not this package, they are the same model."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from clean_environment import make_environment, run
from models import EVERYTHING, EXPERTS, PRESETS, architecture, build, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from yoco_u import Architecture, YocoUConfig, YocoUForCausalLM
from yoco_u.data import train_tokenizer
from yoco_u.errors import UserError
from yoco_u.loading import load_model
from yoco_u.model import remote_code, save_model
from yoco_u.model.remote_code import AUTO_MAP, modelling_files
from yoco_u.version import __version__

ROOT = Path(__file__).parents[2]

CASES: dict[str, Architecture] = {
    **{name: architecture(name, vocab_size=300) for name in PRESETS},
    "everything": architecture("yoco_u", vocab_size=300, **EVERYTHING),
    "experts": architecture("yoco_u", vocab_size=300, experts=EXPERTS),
    "yarn": architecture(
        "transformer",
        vocab_size=300,
        rotary_scaling={"type": "yarn", "factor": 2.0, "original_length": 16, "high_turns": 32.0, "attention_factor": 1.1},
    ),
}

PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

assert not any(importlib.util.find_spec(name) for name in ("yoco_u", "pydantic", "psutil", "wrapt"))
place = Path(sys.argv[1])
given = load_file(place / "inputs.safetensors")
said = {}
settings = {"max_new_tokens": 4, "do_sample": False}
for folder in sorted(place.glob("*/model")):
    name = folder.parent.name
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        said[name] = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.model.")
    with torch.no_grad():
        found = {
            "logits": model(given["ids"]).logits,
            "padded": model(given["ids"], attention_mask=given["mask"]).logits,
            "greedy": model.generate(given["ids"], attention_mask=given["mask"], **settings),
        }
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder.parent / "found.safetensors")
    try:
        type(model.config)(head_dim=3)
    except ValueError as error:
        said[name + " wrong"] = f"{type(error).__name__}: {error}"

folder = place / "yoco_u" / "model"
writer = pipeline("text-generation", model=str(folder), trust_remote_code=True, dtype="float32")
said["text"] = writer("def f", **settings)[0]["generated_text"]
said["loss"] = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if "Yoco" in name)
writer.model.save_pretrained(folder.parent / "copy")
load = {"trust_remote_code": True}
found = {"body": AutoModel.from_pretrained(folder, **load).eval()(given["ids"]).last_hidden_state}
found["again"] = AutoModelForCausalLM.from_pretrained(folder.parent / "copy", **load).eval()(given["ids"]).logits
found["first"] = writer.model(given["ids"]).logits  # now that its operators have been defined twice
writer.model.train()(given["ids"], labels=given["ids"]).loss.backward()
assert all(one.grad.isfinite().all() for one in writer.model.parameters())
save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, place / "more.safetensors")
print(json.dumps(said))
"""


def save(folder: Path, arch: Architecture) -> YocoUForCausalLM:
    model = build(arch, bos_token_id=0, eos_token_id=None, pad_token_id=1)
    model.config.auto_map = AUTO_MAP
    save_model(model, train_tokenizer(["def f(x): return x\n"] * 3, 300), folder)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each case."""
    place = tmp_path_factory.mktemp("models")
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    save_file({"ids": tokens(2, 21, 290), "mask": mask}, place / "inputs.safetensors")
    for name, arch in CASES.items():
        save(place / name / "model", arch)
    return place


@pytest.fixture(scope="module")
def said(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the program above said about each model, of which it has written down what it computed."""
    outside = tmp_path_factory.mktemp("outside")
    environment = make_environment(outside / "packages")
    modules = {"HF_MODULES_CACHE": str(outside / "modules"), "HF_HOME": str(outside / "home"), "HF_HUB_OFFLINE": "1"}
    return json.loads(run(environment, PROGRAM, str(place), **modules).splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_same_model_without_the_package(place: Path, said: dict[str, str], name: str) -> None:
    found, given = load_file(place / name / "found.safetensors"), load_file(place / "inputs.safetensors")
    model, _ = load_model(place / name / "model", torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(found["logits"], model(given["ids"]).logits)
        assert torch.equal(found["padded"], model(given["ids"], attention_mask=given["mask"]).logits)
        greedy = model.generate(given["ids"], attention_mask=given["mask"], max_new_tokens=4, do_sample=False)
    assert torch.equal(found["greedy"], greedy)
    assert "trust_remote_code=True" in said[name]  # nothing of the folder runs unasked
    assert said[f"{name} wrong"] == "UserError: model config: head_dim is 3; rotary embedding needs an even number"


@torch.no_grad()
def test_pipelines_and_copies_without_the_package(place: Path, said: dict[str, str]) -> None:
    model, tokenizer = load_model(place / "yoco_u" / "model", torch.device("cpu"))
    written = model.generate(tokenizer("def f", return_tensors="pt").input_ids, max_new_tokens=4, do_sample=False)[0]
    assert said["loss"] == ["YocoUForCausalLM"]  # whose labels `Trainer` shifts
    assert said["text"] == tokenizer.decode(written, skip_special_tokens=True)
    found, ids = load_file(place / "more.safetensors"), load_file(place / "inputs.safetensors")["ids"]
    assert torch.equal(found["body"], model.model(ids).last_hidden_state)
    assert torch.equal(found["again"], model(ids).logits) and torch.equal(found["first"], found["again"])
    copied = {path.name: path.read_text() for path in (place / "yoco_u" / "copy").glob("*.py")}
    assert copied == modelling_files()  # by transformers, from file to file


def code(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_models_that_came_with_code_keep_it(place: Path, tmp_path: Path) -> None:
    model = YocoUForCausalLM.from_pretrained(place / "yoco_u" / "model")
    assert type(model).__module__.startswith("yoco_u.")
    model.save_pretrained(tmp_path / "again")
    model.config.save_pretrained(tmp_path / "config")
    for folder in (tmp_path / "again", tmp_path / "config"):
        assert code(folder) == modelling_files()
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    build(architecture()).save_pretrained(tmp_path / "plain")
    assert not code(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("cls", [YocoUConfig, YocoUForCausalLM])
def test_registered_for_an_auto_class(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YocoUConfig, "auto_map", None, raising=False)
    cls.register_for_auto_class("AutoModelForCausalLM")
    build(architecture()).save_pretrained(tmp_path)
    assert code(tmp_path) == modelling_files()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_our_own_loading_runs_none_of_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "yoco_u" / "model", tmp_path / "model")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for file in (tmp_path / "model").glob("*.py"):
        file.write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"\.py: the file is damaged"):  # its checksums are those of the other files
        load_model(tmp_path / "model", torch.device("cpu"))
    (tmp_path / "model" / "SHA256SUMS").unlink()
    model, _ = load_model(tmp_path / "model", torch.device("cpu"))
    for trust in (None, False, True):  # where the package is, its own classes are taken whatever is trusted
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=trust)) is YocoUForCausalLM
    assert type(model) is YocoUForCausalLM and not (tmp_path / "modules").exists()


def test_the_files_say_whose_they_are_and_are_no_more_than_is_needed() -> None:
    files = modelling_files()
    for name, text in files.items():
        assert f"yoco-u {__version__}" in text.splitlines()[0] and "SPDX-License-Identifier: MIT" in text
        source = ROOT / text.splitlines()[0].rsplit(" ")[-1]
        assert f"{'_'.join(source.relative_to(ROOT).with_suffix('').parts)}.py" == name
        whole = source.read_text().splitlines()
        cut = [line for line in text.splitlines()[3:] if line not in whole]
        assert all(line.startswith(("from .", "from ", "import ")) for line in cut), cut  # the package's own lines
        assert len(ast.parse(text).body) > 1
    assert not any("serving" in name or "inference" in name or "files" in name for name in files)


def test_another_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model needs is checked when the files are made, not when a stranger loads them."""
    monkeypatch.setattr(remote_code, "_THERE", remote_code._THERE - {"transformers"})
    with pytest.raises(RuntimeError, match=r"yoco_u_model_\w+\.py imports transformers, which programs without yoco-u"):
        modelling_files.__wrapped__()
