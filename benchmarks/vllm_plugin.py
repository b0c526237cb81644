"""Our checkpoints in vLLM: whether they give the greedy tokens of our engine, and how fast YOCO-U is beside a Llama there.

- Tokens: prompts of 1 to `--longest` tokens, cut from the Python standard library, are answered in float32 by our engine and by
  vLLM. Where two answers part, our forward pass gives the logits of both tokens: if these are equal up to rounding, it is a
  tie.
- Speed: prefill and decode of YOCO-U and of a Llama of equal widths and layers, both in vLLM with random weights in bfloat16,
  measured as `yoco-u bench` measures vLLM.

    python benchmarks/vllm_plugin.py runs/quickstart/yoco-u --python ~/vllm/bin/python

runs both, prints tables and writes JSON. `--python` is an environment with vLLM and this package (docs/vllm.md).
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from common import count, parser, show, standard_library_prompts, write
from rich.console import Console

from yoco_u import LLM, SamplingParams, YocoUConfig
from yoco_u.architecture import Architecture, preset
from yoco_u.bench.cases import BenchSettings, cases_of
from yoco_u.bench.engines import WORKERS, BenchEngine, peer_engines
from yoco_u.bench.process import WorkerProcess
from yoco_u.bench.results import as_json
from yoco_u.bench.run import START_SECONDS, Benchmark
from yoco_u.bench.table import print_tables
from yoco_u.errors import UserError, in_one_line
from yoco_u.loading import load_model, model_folder

TIE = 1e-3
"""Two logits that differ by less are a tie: another order of summation can change which one is larger."""

BLOCK, CHUNK = 128, 2048
"""vLLM's block size, and the most tokens of a prompt that it computes in one step, as it is started here."""

WAYS: dict[str, dict[str, Any]] = {"plain": {}, "fast prefill": {"kv_sharing_fast_prefill": True}}
"""The two ways to run our model in vLLM, by the settings that vLLM gets for them."""


def main() -> None:
    arguments = parser(__doc__, "vllm_plugin")
    arguments.add_argument("model", type=Path, help="a trained run or saved model, for the tokens")
    arguments.add_argument("--python", required=True, help="interpreter that has vLLM and this package")
    arguments.add_argument("--prompts", type=count, default=100)
    arguments.add_argument("--longest", type=count, default=2048, help="tokens of the longest prompt")
    arguments.add_argument("--new", type=count, default=64, help="tokens of each answer")
    arguments.add_argument("--size", default="100m", help="of the models whose speed is measured")
    arguments.add_argument("--contexts", type=count, nargs="+", default=[8192, 32768])
    arguments.add_argument("--batches", type=count, nargs="+", default=[1, 8])
    arguments.add_argument("--steps", type=count, default=32, help="decode steps that are timed")
    arguments.add_argument("--rounds", type=count, default=1)
    arguments.add_argument("--time-limit", type=float, default=600.0, help="seconds that one case may take")
    chosen = arguments.parse_args()

    tokens = compare_tokens(chosen)
    show("Greedy tokens of our engine and of vLLM, float32", tokens)
    write(chosen.out, {"tokens": tokens})
    speed = measure_speed(chosen)
    write(chosen.out, {"tokens": tokens, "speed": speed})


def compare_tokens(chosen: Namespace) -> list[dict[str, Any]]:
    """Compare the tokens of all prompts; one row for each way of running vLLM."""
    model, tokenizer = load_model(chosen.model, torch.device("cpu"))
    most = max(chosen.prompts - 1, 1)
    prompts = standard_library_prompts(tokenizer, [round(chosen.longest ** (i / most)) for i in range(chosen.prompts)])
    ours = LLM(chosen.model, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=chosen.new, ignore_eos=True)
    expected = [list(request.outputs[0].token_ids) for request in ours.generate(prompts, params)]

    rows = []
    for way, settings in WAYS.items():
        job = {
            "checkpoint": str(model_folder(chosen.model).resolve()),
            "dtype": "float32",
            "tokens": chosen.longest + chosen.new,
            "settings": settings | {"kv_cache_memory_bytes": 2**30},
        }
        worker = WorkerProcess(chosen.python, WORKERS / "vllm_greedy.py", job, torch.get_num_threads())
        try:
            version = worker.about(START_SECONDS)["version"]
            answer = worker.run({"prompts": prompts, "new": chosen.new}, 10 * chosen.time_limit)
        finally:
            worker.close()
        if "error" in answer:
            raise UserError(f"vLLM, {way}: {answer['error']}")
        gaps = [
            parting(model, prompt, mine, theirs)
            for prompt, mine, theirs in zip(prompts, expected, answer["tokens"], strict=True)
            if mine != theirs
        ]
        rows.append(
            {
                "vLLM": f"{version}, {way}",
                "prompts": len(prompts),
                "identical": len(prompts) - len(gaps),
                "part at a tie": sum(gap < TIE for gap in gaps),
                "differ": sum(gap >= TIE for gap in gaps),
                "largest gap of logits": max(gaps, default=0.0),
            }
        )
    return rows


def parting(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How much higher our token's logit is than that of vLLM's token, at the first position where the answers differ."""
    same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:same]]), logits_to_keep=1, use_cache=False).logits[0, -1]
    return float(logits[ours[same]] - logits[theirs[same]])


def measure_speed(chosen: Namespace) -> dict[str, Any]:
    """Measure, print and return what `yoco-u bench` would, of YOCO-U and a Llama in vLLM."""
    settings = BenchSettings(
        size=chosen.size, architectures=("yoco_u",), contexts=tuple(chosen.contexts), batches=tuple(chosen.batches),
        steps=chosen.steps, rounds=chosen.rounds, time_limit=chosen.time_limit,
    )  # fmt: skip
    a = preset("yoco_u", chosen.size)
    [llama] = peer_engines(settings, a, ["vllm"], {"vllm": chosen.python})
    engines = [ours_in_vllm(f"yoco_u in vllm, {way}", a, way, chosen.python, settings) for way in reversed(WAYS)]
    engines.append(llama)
    benchmark = Benchmark(settings, engines, {engine.name: cases_of(settings) for engine in engines})
    console = Console()
    with console.status("measuring") as status:

        def progress(engine: BenchEngine, case: Any) -> None:
            status.update(f"{engine.name}: {'starting' if case is None else case}")

        measurement = benchmark.run(progress)
    print_tables(console, measurement)
    return as_json(measurement)


def ours_in_vllm(name: str, a: Architecture, way: str, python: str, settings: BenchSettings) -> BenchEngine:
    """An architecture of ours as an engine of the benchmark, run by vLLM in one of the `WAYS`."""
    row = 2 * a.num_key_value_heads * a.head_dim * settings.bytes_per_element
    blocks = blocks_needed(a, max(settings.batches), max(settings.contexts) + settings.steps)
    config = YocoUConfig.from_architecture(a, architectures=["YocoUForCausalLM"], dtype=settings.dtype).to_dict()
    job = {
        "model": {"vocab_size": a.vocab_size},
        "config": config,
        "dtype": settings.dtype,
        "settings": WAYS[way] | {"block_size": BLOCK, "kv_cache_memory_bytes": blocks * BLOCK * row},
    }
    return BenchEngine(name, a, python, WORKERS / "vllm_worker.py", job, is_ours=True)


def blocks_needed(a: Architecture, sequences: int, tokens: int) -> int:
    """How many blocks vLLM needs for some sequences.

    The global KV of a sequence grows with its tokens; each window holds on to the blocks that it reaches (docs/vllm.md). The
    chunk of a prompt that is computed needs blocks in every window besides, and some are spare.
    """
    windows = sum(stage.layers * stage.loops for stage in a.stages if stage.attention == "sliding")
    assert a.window is not None
    of_sequence = -(-tokens // BLOCK) + 1 + windows * (-(-(a.window - 1) // BLOCK) + 2)
    return sequences * of_sequence + windows * (CHUNK // BLOCK) + 16


if __name__ == "__main__":
    in_one_line(main)
