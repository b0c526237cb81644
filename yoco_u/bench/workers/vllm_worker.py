"""The worker of vLLM. The model has random weights: it is a Llama, or what a job's `config` (of the model) and `settings` (of
vLLM) describe.

vLLM compiles the model, has its prefix cache off, and gets prompts as token ids. The context of a decode case is filled in by
vLLM's own connector for decode benchmarks. Intel's OpenMP, which vLLM's CPU guide asks to preload, is preloaded if it lies in
the environment. The worker runs wherever vLLM is installed.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker_protocol import Case, Job, Run, longest, most_tokens, serve

BATCHED_TOKENS = 2048  # most tokens of one step
BLOCK = 128  # tokens of a block of vLLM's cache on a CPU
WARM_STEPS = 4


def start(job: Job) -> tuple[Run, dict[str, Any]]:
    set_environment(job)

    import vllm
    from vllm import LLM

    shape = job["model"]
    folder = Path(job["folder"]) / "model"
    folder.mkdir()
    config = job.get("config") or llama_config(shape, longest(job), job["dtype"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    batch = max((case["batch"] for case in job["cases"] if case["kind"] == "decode"), default=1)
    settings = {"max_num_batched_tokens": BATCHED_TOKENS, "max_num_seqs": batch}
    settings |= job.get("settings") or {"kv_cache_memory_bytes": llama_cache_bytes(job, batch)}
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        max_model_len=longest(job),
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_transfer_config={
            "kv_connector": "FilledCache",
            "kv_connector_module_path": "vllm_filled_cache",
            "kv_role": "kv_both",
        },
        **settings,
    )
    worker = VllmWorker(llm, shape["vocab_size"])
    worker.prefill(min(256, longest(job) - 1))
    return worker.run, {"version": vllm.__version__, **settings}


class VllmWorker:
    """A loaded model, and the cases that run on it.

    Args:
        llm: vLLM's `LLM`.
    """

    def __init__(self, llm: Any, vocab_size: int) -> None:
        self.llm, self.vocab_size = llm, vocab_size
        self.requests = 0
        self.random = random.Random(0)

    def run(self, case: Case) -> dict[str, Any]:
        if case["kind"] == "prefill":
            return {"seconds": self.prefill(case["tokens"])}
        return {"seconds": self.decode(case["context"], case["batch"], case["steps"])}

    def prefill(self, tokens: int) -> float:
        """Seconds until the first new token behind a prompt of `tokens` tokens is known."""
        begin = time.perf_counter()
        self.add(tokens, 1, fill=False)
        self.step_until(lambda written: min(written.values()) >= 1, 1)
        return time.perf_counter() - begin

    def decode(self, context: int, batch: int, steps: int) -> float:
        """Seconds of `steps` decode steps of `batch` sequences, each behind `context` made-up tokens."""
        for _ in range(batch):
            self.add(context, WARM_STEPS + steps, fill=True)
        written = self.step_until(lambda written: min(written.values()) >= WARM_STEPS, batch)
        begin, before = time.perf_counter(), min(written.values())
        after = self.step_until(lambda written: min(written.values()) >= WARM_STEPS + steps, batch, written)
        elapsed = time.perf_counter() - begin
        return elapsed * steps / (min(after.values()) - before)

    def add(self, tokens: int, new: int, fill: bool) -> None:
        """Queue a request of random tokens.

        Args:
            tokens: length of the prompt.
            new: how many tokens to generate.
            fill: whether the prompt's keys and values are filled in instead of computed.
        """
        from vllm import SamplingParams

        self.requests += 1
        params = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
            extra_args={"kv_transfer_params": {"fill": True}} if fill else None,
        )  # fmt: skip
        prompt = [self.random.randrange(self.vocab_size) for _ in range(tokens)]
        self.llm.llm_engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)

    def step_until(
        self, done: Callable[[dict[str, int]], bool], batch: int, written: dict[str, int] | None = None
    ) -> dict[str, int]:
        """Run steps until a condition holds.

        Args:
            done: the condition, on how many new tokens each request has, by its id.
            batch: how many requests there are; all must have a token before the condition is asked.
            written: how many new tokens each request has at the beginning; none by default.

        Returns:
            How many new tokens each request has in the end.
        """
        written = dict(written or {})
        while len(written) < batch or not done(written):
            for output in self.llm.llm_engine.step():
                written[output.request_id] = len(output.outputs[0].token_ids)
        return written


def llama_config(shape: dict[str, Any], length: int, dtype: str) -> dict[str, Any]:
    """A Llama's `config.json`.

    Args:
        shape: the job's `model`.
        length: the most tokens of a sequence.
    """
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "hidden_act": "silu",
        "vocab_size": shape["vocab_size"], "hidden_size": shape["hidden_size"], "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"], "max_position_embeddings": length, "rms_norm_eps": shape["rms_norm_eps"],
        "rope_theta": shape["rope_theta"], "tie_word_embeddings": shape["tie_word_embeddings"],
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def llama_cache_bytes(job: Job, batch: int) -> int:
    """Bytes of cache for the largest case of a job, and two blocks to spare for each sequence and for vLLM itself."""
    shape = job["model"]
    row = 2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * (4 if job["dtype"] == "float32" else 2)
    return row * (most_tokens(job) + 2 * BLOCK * (batch + 1))


def set_environment(job: Job) -> None:
    """Set the environment variables that vLLM reads: its threads run on the job's CPUs, and it downloads and reports
    nothing."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in cpus(job["threads"]))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


def preload_openmp() -> None:
    """Start this script anew with Intel's OpenMP preloaded, if it is installed: decode becomes 1.5 times as fast or more."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    before = os.environ.get("LD_PRELOAD", "")
    if library.exists() and str(library) not in before:
        os.environ["LD_PRELOAD"] = f"{library}:{before}".rstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.argv])


def cpus(threads: int) -> list[int]:
    """Numbers of the first CPUs that this process may use, one for each thread."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return available[:threads]


if __name__ == "__main__":
    preload_openmp()
    serve(start)
