"""The worker of llama.cpp, through llama-cpp-python. The model is a Llama of random weights, written as a GGUF file here.

Weights are bfloat16 or float32, or Q8_0 where ours are int8. Attention is flash attention, the cache is float16 as llama.cpp
has it by default. The context of a decode case is restored from a saved state that is made up here. The worker runs wherever
llama_cpp, gguf and numpy are installed.
"""

import ctypes
import math
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np
from worker_protocol import Case, Job, Run, forget_peak, serve

TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
CACHE_TYPES = {"float32": (llama.GGML_TYPE_F32, np.float32), "bfloat16": (llama.GGML_TYPE_F16, np.float16)}
BATCH, MICRO_BATCH = 2048, 512  # tokens that one call is given, and that llama.cpp computes at a time
WARM_STEPS = 4


def start(job: Job) -> tuple[Run, dict[str, Any]]:
    kind = gguf.GGMLQuantizationType.Q8_0 if job["weights"] == "int8" else TYPES[job["dtype"]]
    path = Path(job["folder"]) / "llama.gguf"
    write_gguf(path, job["model"], kind)
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise RuntimeError("llama.cpp could not load the GGUF file; its messages are above")
    worker = LlamaCppWorker(model, job)
    worker.prefill(256)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    about = {"version": llama.__version__, "weights": kind.name, "bytes_per_weight": size / block, "micro_batch": MICRO_BATCH}
    return worker.run, about


class LlamaCppWorker:
    """A loaded model, and the cases that run on it.

    Args:
        model: llama.cpp's handle of the model.
    """

    def __init__(self, model: Any, job: Job) -> None:
        self.model, self.shape, self.threads = model, job["model"], job["threads"]
        self.cache_type, self.cache_dtype = CACHE_TYPES[job["dtype"]]
        self.random = np.random.default_rng(0)

    def run(self, case: Case) -> dict[str, Any]:
        if case["kind"] == "prefill":
            return {"seconds": self.prefill(case["tokens"])}
        return {"seconds": self.decode(case["context"], case["batch"], case["steps"])}

    def prefill(self, tokens: int) -> float:
        """Seconds until the first new token behind a prompt of `tokens` tokens is known."""
        context = self.context(tokens + 1, 1)
        prompt = self.random.integers(self.shape["vocab_size"], size=tokens)
        begin = time.perf_counter()
        for at in range(0, tokens, BATCH):
            chunk = prompt[at : at + BATCH]
            rows = [(int(token), at + i, 0, at + i == tokens - 1) for i, token in enumerate(chunk)]
            self.compute(context, rows)
        self.best(context, -1)
        elapsed = time.perf_counter() - begin
        llama.llama_free(context)
        return elapsed

    def decode(self, context_tokens: int, batch: int, steps: int) -> float:
        """Seconds of `steps` decode steps of `batch` sequences, each behind `context_tokens` made-up tokens."""
        context = self.context(context_tokens + WARM_STEPS + steps, batch)
        state = self.state(context, context_tokens, batch)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        for sequence in range(batch):
            if not llama.llama_state_seq_set_data(context, buffer, len(state), sequence):
                raise RuntimeError("llama.cpp refused the made-up state; this version may lay it out differently")
        del buffer, state
        forget_peak()
        tokens, begin = [0] * batch, 0.0
        for step in range(WARM_STEPS + steps):
            if step == WARM_STEPS:
                begin = time.perf_counter()
            self.compute(context, [(token, context_tokens + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [self.best(context, row) for row in range(batch)]
        elapsed = time.perf_counter() - begin
        llama.llama_free(context)
        return elapsed

    def context(self, tokens: int, sequences: int) -> Any:
        """llama.cpp's context, which holds the caches, for `sequences` sequences of `tokens` tokens each."""
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = sequences * math.ceil(tokens / 256) * 256
        parameters.n_seq_max = sequences
        parameters.n_batch, parameters.n_ubatch = max(BATCH, sequences), MICRO_BATCH
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.type_k = parameters.type_v = self.cache_type
        context = llama.llama_init_from_model(self.model, parameters)
        if not context:
            raise MemoryError(f"llama.cpp could not make a context of {parameters.n_ctx} tokens")
        return context

    def compute(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run tokens as one batch, each given as (token, position, sequence, whether its logits are needed)."""
        batch = llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave status {status}")

    def best(self, context: Any, row: int) -> int:
        """The likeliest token by the logits of a row of the last batch; -1 is its last row."""
        logits = llama.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.shape["vocab_size"],)).argmax())

    def state(self, context: Any, tokens: int, sequences: int) -> bytearray:
        """A sequence's state as llama.cpp saves it, in which `tokens` positions hold random keys and values.

        Args:
            sequences: how many sequences the context is for, on which the layout depends.
        """
        empty = (ctypes.c_uint8 * llama.llama_state_seq_get_size(context, 0))()
        llama.llama_state_seq_get_data(context, empty, len(empty), 0)
        header = bytes(empty)[: -4 * (1 + sequences)]  # what follows is the number of streams, and of cells in each
        layers, width = self.shape["layers"], self.shape["kv_heads"] * self.shape["head_dim"]
        cells = np.zeros((tokens, 3), dtype=np.int32)  # position, number of sequences, sequence
        cells[:, 0], cells[:, 1] = np.arange(tokens), 1
        parts = [header, struct.pack("<II", sequences, tokens), cells.tobytes(), struct.pack("<II", 0, layers)]
        head = struct.pack("<iQ", self.cache_type, width * np.dtype(self.cache_dtype).itemsize)
        for _ in range(2 * layers):  # all keys, then all values
            rows = self.random.standard_normal((min(tokens, 512), width), dtype=np.float32).astype(self.cache_dtype)
            parts += [head, np.resize(rows, (tokens, width)).tobytes()]
        parts.append(struct.pack(f"<{sequences - 1}I", *[0] * (sequences - 1)))
        return bytearray().join(parts)


def write_gguf(path: Path, shape: dict[str, Any], kind: gguf.GGMLQuantizationType) -> None:
    """Write a Llama of random weights. The rows of random matrices need not be permuted to llama.cpp's order for RoPE."""
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(1 << 20)
    writer.add_block_count(shape["layers"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    random = np.random.default_rng(0)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(hidden**-0.5)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))

    matrix("token_embd", shape["vocab_size"], hidden)
    norm("output_norm")
    if not shape["tie_word_embeddings"]:
        matrix("output", shape["vocab_size"], hidden)
    for i in range(shape["layers"]):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_q", queries, hidden)
        matrix(f"blk.{i}.attn_k", keys, hidden)
        matrix(f"blk.{i}.attn_v", keys, hidden)
        matrix(f"blk.{i}.attn_output", hidden, queries)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", inner, hidden)
        matrix(f"blk.{i}.ffn_up", inner, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    serve(start)
