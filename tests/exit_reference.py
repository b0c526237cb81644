"""The reference of tests/reference.py for tokens that leave the loop: one token after another, over caches."""

import math
from collections.abc import Callable
from typing import Any

from reference import Weights, _Reference
from torch import Tensor

Score = Callable[[int, Tensor, Tensor], float]
"""Of a token, from the loop (counted from 0) and the states before and after it."""


def angular(loop: int, before: Tensor, after: Tensor) -> float:
    cosine = float(before @ after / (before.norm() * after.norm()))
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


class ExitReference(_Reference):
    """One sequence, whose tokens leave the loop where their score is below the threshold.

    Attributes:
        loops: how many loops each token ran in the stage that loops.
        nearest: the smallest distance of a score from the threshold.
    """

    def __init__(self, weights: Weights, architecture: dict[str, Any], threshold: float, score: Score = angular) -> None:
        super().__init__(weights, architecture)
        self.threshold, self.score = threshold, score
        self.loops: list[int] = []
        self.nearest = math.inf
        self.cache: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}  # by stage, loop and layer

    def stages(self, xs: list[Tensor], stream: int) -> list[Tensor]:
        return [self.token(x, n) for n, x in enumerate(xs)]

    def token(self, x: Tensor, n: int) -> Tensor:
        crossing = sum(stage["layers"] for stage in self.a["stages"] if stage["attention"] == "cross")
        crossed = 0
        for s, stage in enumerate(self.a["stages"]):
            if stage["attention"] == "cross" and not crossed:
                for number in range(self.a["global_kvs"]):
                    self.cache.setdefault((-1, 0, number), []).append(self.global_row(x, n, number))
            ran = 0
            for loop in range(stage["loops"]):
                before = x
                for layer in range(stage["layers"]):
                    read = (crossed + layer) * self.a["global_kvs"] // crossing if stage["attention"] == "cross" else None
                    x = self.one_block(x, n, (s, loop, layer), read)
                if loop and stage["loop_gate"] is not None:
                    gates = self.w[f"model.stages.{s}.loop_gates"]
                    x = before + gates[min(loop - 1, len(gates) - 1)] * (x - before)
                ran = loop + 1
                if ran < stage["loops"]:
                    score = self.score(loop, before, x)
                    self.nearest = min(self.nearest, abs(score - self.threshold))
                    if score < self.threshold:
                        break
            if stage["loops"] > 1:
                self.loops.append(ran)
            for loop in range(ran, stage["loops"]):  # what the loops that did not run hold of it
                for layer in range(stage["layers"]):
                    if stage["attention"] != "cross":
                        self.cache.setdefault((s, loop, layer), []).append(self.key_and_value(x, n, s, layer))
            crossed += stage["layers"] if stage["attention"] == "cross" else 0
        return x

    def one_block(self, x: Tensor, n: int, at: tuple[int, int, int], read: int | None) -> Tensor:
        name, kind = f"model.stages.{at[0]}.layers.{at[2]}", self.a["stages"][at[0]]["attention"]
        normed = self.norm(f"{name}.attn_norm", x)
        rotated = n if read is None or self.a["rope_cross"] else None
        query = self.project(f"{name}.attn.q_proj", normed, self.heads, rotated, f"{name}.attn.q_norm")
        rows = self.cache[-1, 0, read] if read is not None else self.cache.setdefault(at, [])
        if read is None:
            rows.append(self.key_and_value(x, n, at[0], at[2]))
        assert len(rows) == n + 1
        seen = rows[-self.a["window"] :] if kind == "sliding" else rows
        attended = self.softmax_attention(query, [k for k, _ in seen], [v for _, v in seen])
        y = x + self.w[f"{name}.attn.o_proj.weight"] @ attended
        return y + self.feed_forward(f"{name}.mlp", self.norm(f"{name}.mlp_norm", y))

    def key_and_value(self, x: Tensor, n: int, stage: int, layer: int) -> tuple[Tensor, Tensor]:
        """What a layer lets others see of a token whose state in front of it is x."""
        name = f"model.stages.{stage}.layers.{layer}"
        x = self.norm(f"{name}.attn_norm", x)
        key = self.project(f"{name}.attn.k_proj", x, self.kv_heads, n, f"{name}.attn.k_norm")
        return key, self.project(f"{name}.attn.v_proj", x, self.kv_heads)

    def global_row(self, x: Tensor, n: int, number: int) -> tuple[Tensor, Tensor]:
        x, name, position = self.norm("model.global_kv.norm", x), "model.global_kv", n if self.a["rope_cross"] else None
        key = self.project(f"{name}.k_proj", x, self.kv_heads, position, f"{name}.k_norm", part=number)
        return key, self.project(f"{name}.v_proj", x, self.kv_heads, part=number)
