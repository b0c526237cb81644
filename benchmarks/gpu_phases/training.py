"""Training rates: whole optimizer steps of our models, and of transformers' Llama of the same shape and optimizer.

A step is forward, backward, clipping and fused AdamW under bfloat16 autocast with float32 weights. Model FLOPs of all come from
`yoco_u.budget`, which gives no credit for masked or repeated work. A model whose activations do not fit is trained once more
with all its blocks recomputed in the backward pass.
"""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_phases.record import Figure, Record
from gpu_phases.scale import Scale, TrainedModel
from yoco_u.architecture import Architecture, preset
from yoco_u.budget import training_flops
from yoco_u.config import parse
from yoco_u.data.batches import as_batch
from yoco_u.device import find_device, peak_memory_bytes, synchronize
from yoco_u.model import YocoUConfig, YocoUForCausalLM
from yoco_u.training.config import RunConfig
from yoco_u.training.distributed import Distributed
from yoco_u.training.optimizer import build_optimizer
from yoco_u.training.parallelize import parallelize
from yoco_u.training.step import TrainingStep

_WARM_STEPS = 2
_SECONDS = 20.0  # of one model at the least: loading, compiling, steps

Step = Callable[[], Any]


def run(record: Record, scale: Scale) -> None:
    device = find_device(scale.device)
    for trained in scale.trained:
        record.measure(name_of(trained), partial(_measure, trained, device, scale.training_steps), least=_SECONDS)


def name_of(trained: TrainedModel) -> str:
    return f"{trained.model} {trained.size}, length {trained.length}{', compiled' if trained.compiled else ''}"


def _measure(trained: TrainedModel, device: torch.device, steps: int) -> Figure:
    try:
        return _timed(trained, device, steps, recompute=False)
    except torch.OutOfMemoryError:
        pass
    _forget(device)
    return _timed(trained, device, steps, recompute=True)


def _timed(trained: TrainedModel, device: torch.device, steps: int, recompute: bool) -> Figure:
    is_ours = trained.model != "llama"
    architecture = preset(trained.model if is_ours else "transformer", trained.size)
    make = our_step if is_ours else llama_step
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = make(architecture, trained, device, recompute)
        begin = time.perf_counter()
        for _ in range(_WARM_STEPS):
            step()
        synchronize(device)
        warm = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(steps):
            loss = step()
        synchronize(device)
        seconds = (time.perf_counter() - begin) / steps
    finally:
        step = None  # type: ignore[assignment]
        _forget(device)
    tokens = trained.rows * trained.length
    flops = training_flops(architecture, trained.length)
    return {
        "tokens_per_second": tokens / seconds,
        "model_flops_per_second": flops * tokens / seconds,
        "seconds_of_a_step": seconds,
        "warm_up_seconds": warm,
        "tokens_of_a_step": tokens,
        "recomputed": recompute,
        "loss": float(loss),
        "peak_bytes": peak_memory_bytes(device),
    }


def our_step(a: Architecture, trained: TrainedModel, device: torch.device, recompute: bool) -> Step:
    """One step of the trainer, without reading data."""
    training = {
        "steps": 1000, "sequence_length": trained.length, "batch_rows": trained.rows, "micro_batch_rows": trained.rows,
        "dtype": "bfloat16", "compile": "on" if trained.compiled else "off", "device": str(device),
        "checkpoint_stages": tuple(range(len(a.stages))) if recompute else (),
    }  # fmt: skip
    described = {"name": "gpu", "architecture": a.model_dump(), "dataset": "none", "training": training}
    config, distributed = parse(RunConfig, described, "gpu"), Distributed(0, 1, 0, device)
    with torch.device(device):
        plain = YocoUForCausalLM(YocoUConfig.from_architecture(a))
    model = parallelize(plain, config.training, distributed)
    training_step = TrainingStep(model, build_optimizer(model, config.optimizer), config, distributed)
    rows = torch.randint(1, a.vocab_size, (trained.rows, trained.length + 1), generator=torch.Generator().manual_seed(0))
    batch = as_batch(rows.numpy(), eot_id=0)

    def step() -> float:
        result = training_step.gradients(batch)
        training_step.update(result, 100)
        return result.loss

    return step


def llama_step(a: Architecture, trained: TrainedModel, device: torch.device, recompute: bool) -> Step:
    """The same with transformers' model; its decoder layers are compiled one by one, as ours are."""
    config = LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
        num_hidden_layers=a.unrolled_layers, num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_key_value_heads, head_dim=a.head_dim, tie_word_embeddings=a.tie_word_embeddings,
        max_position_embeddings=trained.length, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model = model.to(device).train()
    if recompute:
        model.gradient_checkpointing_enable()
    if trained.compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    size = (trained.rows, trained.length)
    tokens = torch.randint(1, a.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _forget(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
