"""The slow reference once more, which also writes down what every layer reads, writes and attends to."""

from typing import Any

import torch
from reference import _Reference
from torch import Tensor

from yoco_u import YocoUForCausalLM


class RecordedReference(_Reference):
    """One sequence run token by token.

    Attributes:
        reads, writes: of every unrolled layer, (tokens, hidden) each; with streams, all layers of one after those of another.
        weights: of every unrolled layer, by token, (heads, keys) each: prefix first, the last key is the token itself.
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
        """What the one looped stage reads, and what each of its loops leaves."""
        at = 0
        for stage in self.a["stages"]:
            if stage["loops"] > 1:
                states = [*self.reads, self.ends[0]]
                return [states[at + loop * stage["layers"]] for loop in range(stage["loops"] + 1)]
            at += stage["layers"]
        raise AssertionError("no stage loops")

    def read_out(self, states: Tensor) -> Tensor:
        """Logits if the network ended there, (tokens, vocab)."""
        head = self.w["model.embed_tokens.weight" if self.a["tie_word_embeddings"] else "lm_head.weight"]
        return torch.stack([head @ self.norm("model.norm", x) for x in states])
