"""The slow reference of `reference.py`, which also records what every layer reads, writes and attends to."""

from functools import cache
from typing import Any

import torch
from loop_models import batch, make
from reference import _Reference
from torch import Tensor

from yoco_u import YocoUForCausalLM


class RecordedReference(_Reference):
    """One sequence run token by token. All lists are in the order of the pass; with streams, one stream after another.

    Attributes:
        reads, writes: input and output of every unrolled layer, (tokens, hidden) each.
        weights: attention weights of every unrolled layer and token, (heads, keys) each: learned prefix keys first, the token
            itself last.
        ends: output of the last stage of every stream, (tokens, hidden).
        final: logits of all tokens, (tokens, vocab).
    """

    def __init__(self, model: YocoUForCausalLM, num_loops: int | None, ids: list[int]) -> None:
        weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        architecture = model.model.architecture
        architecture = architecture if num_loops is None else architecture.with_loops(num_loops)
        super().__init__(weights, architecture.model_dump())
        self.reads: list[Tensor] = []
        self.writes: list[Tensor] = []
        self.weights: list[list[Tensor]] = []
        self.ends: list[Tensor] = []
        self.final = self.logits(ids)

    def stages(self, xs: list[Tensor], stream: int) -> list[Tensor]:
        out = super().stages(xs, stream)
        self.ends.append(torch.stack(out))
        return out

    def block(self, name: str, kind: str, xs: list[Tensor], stream: int, global_kv: Any) -> list[Tensor]:
        self.weights.append([])
        out = super().block(name, kind, xs, stream, global_kv)
        self.reads.append(torch.stack(xs))
        self.writes.append(torch.stack(out))
        return out

    def softmax_attention(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        groups = self.heads // self.kv_heads
        scores = [[float(query[h] @ key[h // groups]) / self.a["head_dim"] ** 0.5 for key in keys] for h in range(self.heads)]
        self.weights[-1].append(torch.tensor(scores, dtype=torch.float64).softmax(-1))
        return super().softmax_attention(query, keys, values)

    def loop_states(self) -> list[Tensor]:
        """The input of the one looped stage, and the output of each of its loops, loop gates included."""
        at = 0
        for stage in self.a["stages"]:
            if stage["loops"] > 1:
                states = [*self.reads, self.ends[0]]
                return [states[at + loop * stage["layers"]] for loop in range(stage["loops"] + 1)]
            at += stage["layers"]
        raise AssertionError("no stage loops")

    def read_out(self, states: Tensor) -> Tensor:
        """The logits if the network ended at these states, (tokens, vocab)."""
        head = self.w["model.embed_tokens.weight" if self.a["tie_word_embeddings"] else "lm_head.weight"]
        return torch.stack([head @ self.norm("model.norm", x) for x in states])


@cache
def recorded(variant: str, num_loops: int | None = None) -> RecordedReference:
    """That of the variant's model on the row of `batch()`, which takes longer than all that is held against it."""
    return RecordedReference(make(variant), num_loops, batch()["input_ids"][0].tolist())
