"""What is loaded when: the command line without torch, the package with its models registered."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import yoco_u
from yoco_u import YocoUConfig, YocoUForCausalLM
from yoco_u.architecture import preset

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "datasets"}

SCRIPT = f"""\
import sys
from yoco_u.cli import main
status = main()
print("loaded:", *sorted({HEAVY!r} & sys.modules.keys()))
sys.exit(status)
"""
"""What an installed `yoco-u` does, and what it has loaded in the end."""


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    YocoUForCausalLM(YocoUConfig.from_architecture(preset("yoco_u", "test"))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_help_and_plan_load_nothing_heavy(tmp_path: Path, model: Path) -> None:
    (tmp_path / "run").mkdir()
    config = "architecture: {preset: yoco_u, size: 8m}\n"
    (tmp_path / "run" / "config.yaml").write_text(config)
    command = tmp_path / "yoco-u"
    command.write_text(SCRIPT)
    for arguments in (
        ["--help"],
        ["bench", "--help"],
        ["plan", "--json", tmp_path / "plan.json"],
        ["plan", model, tmp_path / "run", tmp_path / "run" / "config.yaml", "--kv-dtype", "int8"],
    ):
        lines = python(command, *arguments).stdout.splitlines()
        assert lines[-1].strip() == "loaded:", arguments
        assert len(lines) > 10
    assert (tmp_path / "plan.json").is_file()


def test_plan_as_a_module_loads_nothing_heavy() -> None:
    found = python("-X", "importtime", "-m", "yoco_u.cli", "plan")
    loaded = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "yoco_u.planning.plan" in loaded
    assert not HEAVY & loaded


def test_plot_loads_no_torch(tmp_path: Path) -> None:
    command = tmp_path / "yoco-u"
    command.write_text(SCRIPT)
    assert python(command, "plan", "--plot", tmp_path / "plan.png").stdout.splitlines()[-1] == "loaded: matplotlib numpy"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert python("-c", f"import sys, yoco_u; print(sorted({HEAVY!r} & sys.modules.keys()))").stdout.strip() == "[]"


ORDERS = (
    "import yoco_u, transformers",
    "import transformers, yoco_u",
    "import yoco_u; from transformers import Trainer, pipeline; import transformers",
    "import transformers, yoco_u.model",
)

FORKS = f"""\
import os, sys
import accelerate, datasets, huggingface_hub, pydantic, scipy.optimize, tokenizers, torch._dynamo, torch.distributed.checkpoint
import torch.distributed.tensor, torchao.prototype.safetensors.safetensors_support
assert not {{"transformers", "yoco_u"}} & sys.modules.keys()
for number, order in enumerate({ORDERS!r}):
    if os.fork() == 0:
        exec(order)
        print(
            number,
            type(transformers.AutoConfig.for_model("yoco_u")).__name__,
            type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__,
            type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__,
            flush=True,
        )
        os._exit(0)
    os.wait()
"""
"""Imports in one order after the other, each in a process forked from one that has imported what takes long besides."""


def test_auto_classes_work_after_importing_the_package(model: Path) -> None:
    lines = python("-c", FORKS, model).stdout.splitlines()
    assert lines == [f"{number} YocoUConfig YocoUConfig YocoUForCausalLM" for number in range(len(ORDERS))]


def test_public_names() -> None:
    assert not (set(yoco_u.__all__) - {"__version__"}) & vars(yoco_u).keys()  # each is looked up when it is asked for
    for name in yoco_u.__all__:
        assert getattr(yoco_u, name) is not None
        assert name in dir(yoco_u)
    assert isinstance(yoco_u.LLM, type)
    with pytest.raises(AttributeError, match=r"^module 'yoco_u' has no attribute 'Nothing'$"):
        _ = yoco_u.Nothing
