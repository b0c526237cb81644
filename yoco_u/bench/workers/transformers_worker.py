"""The worker of transformers. The model is a Llama of random weights, with SDPA attention, on a CPU or a GPU.

Prefill is one eager forward pass. Decode runs in the two ways that transformers offers, of which the faster counts: eager with
the growing cache that `generate()` makes; and, if the job says `compile`, under torch.compile with a static cache. The context
of a decode case is random keys and values. The worker runs wherever transformers and torch are installed.
"""

import time
import traceback
from typing import Any

import torch
import transformers
from gpu_case import measured
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from worker_protocol import Case, Job, Run, forget_peak, longest, serve

WARM_STEPS = 4


def start(job: Job) -> tuple[Run, dict[str, Any]]:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    shape = job["model"]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"], tie_word_embeddings=shape["tie_word_embeddings"], rms_norm_eps=shape["rms_norm_eps"],
        max_position_embeddings=longest(job), dtype=job["dtype"],
    )  # fmt: skip
    device = job["device"]
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, job["dtype"])).eval().to(device)
    worker = TransformersWorker(model, job.get("compile", False))
    worker.prefill(min(8192, longest(job)) if torch.device(device).type == "cuda" else 256)

    def run(case: Case) -> dict[str, Any]:
        return measured(device, lambda: worker.run(case))

    return run, {"version": transformers.__version__, "torch": torch.__version__}


class TransformersWorker:
    """A model, and the cases that run on it.

    Args:
        compiles: whether decode is timed under torch.compile too.
    """

    def __init__(self, model: Any, compiles: bool) -> None:
        self.model, self.config = model, model.config
        self.compiled = torch.compile(model.forward, dynamic=False) if compiles else None
        torch._dynamo.config.recompile_limit = 256  # every context and every batch is compiled to a graph of its own

    @torch.inference_mode()
    def run(self, case: Case) -> dict[str, Any]:
        if case["kind"] == "prefill":
            return {"seconds": self.prefill(case["tokens"])}
        ways = {"eager": self.decode(self.model.forward, DynamicCache(config=self.config), case)}
        if self.compiled is not None:
            cache = StaticCache(config=self.config, max_cache_len=case["context"] + WARM_STEPS + case["steps"])
            try:
                ways["compiled"] = self.decode(self.compiled, cache, case)
            except Exception:  # if compiling fails, the eager time counts
                traceback.print_exc()
        best = min(ways, key=lambda way: ways[way])
        return {"seconds": ways[best], "way": best, "seconds_by_way": ways}

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """Seconds until the first new token behind a prompt of `tokens` tokens is known."""
        prompt = torch.randint(self.config.vocab_size, (1, tokens)).to(self.model.device)
        begin = time.perf_counter()
        output = self.model(input_ids=prompt, past_key_values=DynamicCache(config=self.config), logits_to_keep=1)
        output.logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - begin

    def decode(self, forward: Any, cache: Any, case: Case) -> float:
        """Seconds of a case's decode steps by a forward function, with a cache that is still empty."""
        for layer in range(self.config.num_hidden_layers):
            rows = self.random_rows(case["batch"], case["context"])
            cache.update(rows, rows.clone(), layer)
        forget_peak()
        tokens, begin = torch.zeros(case["batch"], 1, dtype=torch.long, device=self.model.device), 0.0
        for step in range(WARM_STEPS + case["steps"]):
            if step == WARM_STEPS:
                tokens.tolist()  # waits for a GPU
                begin = time.perf_counter()
            logits: Tensor = forward(input_ids=tokens, past_key_values=cache).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()
        return time.perf_counter() - begin

    def random_rows(self, batch: int, tokens: int) -> Tensor:
        """Keys or values of one layer, (batch, kv_heads, tokens, head_dim)."""
        size = (batch, self.config.num_key_value_heads, tokens, self.config.head_dim)
        return torch.randn(size, dtype=self.model.dtype, device=self.model.device)


if __name__ == "__main__":
    serve(start)
