"""Folders with models and tokenizers are data: code that comes with them never runs, and nobody is asked whether it should."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import architecture, build

from yoco_u.data import load_tokenizer, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.loading import load_model, read_tokenizer

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast as Tokenizer, PreTrainedConfig as Config, PreTrainedModel as Model
def generate(*args, **kwargs): pass
"""
TOKENIZERS: list[Any] = [
    {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
    {"AutoTokenizer": [None, "code.Tokenizer"]},
    {"AutoTokenizer": "code.Tokenizer"},
    ["code.Tokenizer", None],
    {"AutoConfig": "code.Config"},
]
CLASSES = ["PreTrainedTokenizerFast", "TokenizersBackend", "Tokenizer", None]
CONFIGS: list[Any] = [
    None,
    {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(["hello you"], 300)
    build(architecture("yoco_u", vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def test_adapters_beside_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    """transformers would load them, from wherever they say, and the engine's kernels would pass them over."""
    peft = pytest.importorskip("peft")
    model, _ = load_model(saved, torch.device("cpu"))
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"adapter_config\.json: adapters lie beside the weights; merge them"):
        load_model(tmp_path, torch.device("cpu"))


def test_more_layers_than_tensors_are_refused_before_they_are_made(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    stages = json.loads((tmp_path / "config.json").read_text())["stages"]
    edit(tmp_path / "config.json", stages=[stages[0] | {"layers": 10**9}, *stages[1:]])
    with pytest.raises(UserError, match=r"the config has 1,000,000,\d+ layers, but the weights have \d+ tensors"):
        load_model(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(("in_tokenizer", "named", "in_config"), itertools.product(TOKENIZERS, CLASSES, CONFIGS))
def test_code_of_a_folder_does_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_tokenizer: Any, named: Any, in_config: Any
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(saved, folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    asked: list[Any] = []

    def yes(*prompt: Any) -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(mark=str(mark)))
    edit(folder / "tokenizer_config.json", auto_map=in_tokenizer, tokenizer_class=named)
    edit(folder / "config.json", auto_map=in_config)
    edit(folder / "processor_config.json", auto_map={"AutoProcessor": "code.Tokenizer"}, processor_class="Tokenizer")
    edit(folder / "generation_config.json", custom_generate=str(folder))
    for load in (load_tokenizer, read_tokenizer, lambda path: load_model(path, torch.device("cpu"))):
        try:
            load(folder)
        except UserError as error:
            assert "\n" not in str(error)
    assert not mark.exists() and not asked
