"""The reference of the tests: the whole forward pass, token by token and head by head, written from the papers' equations.

It shares no code with the package: it reads the tensors of a checkpoint by name, and the architecture as plain values
(`Architecture.model_dump()`). It runs one sequence, without padding and without a cache, and is slow.
"""

import math
from typing import Any

import torch
from torch import Tensor

RETENTION_TEMPERATURE = 16
Weights = dict[str, Tensor]


def reference_logits(weights: Weights, architecture: dict[str, Any], ids: list[int]) -> Tensor:
    """Logits of every position, (tokens, vocab), differentiable in `weights`. Give the weights in float64 for exact results."""
    return _Reference(weights, architecture).logits(ids)


def reference_loss(weights: Weights, architecture: dict[str, Any], ids: list[int]) -> Tensor:
    """The mean of -log p(next token) over all tokens but the last."""
    logits = reference_logits(weights, architecture, ids[:-1])
    losses = [torch.logsumexp(row, 0) - row[target] for row, target in zip(logits, ids[1:], strict=True)]
    return sum(losses, torch.zeros(())) / len(losses)


class _Reference:
    def __init__(self, weights: Weights, architecture: dict[str, Any]) -> None:
        self.w, self.a = weights, architecture
        self.heads, self.kv_heads = architecture["num_attention_heads"], architecture["num_key_value_heads"]

    def logits(self, ids: list[int]) -> Tensor:
        embedding = self.w["model.embed_tokens.weight"]
        parallel = self.a["parallel"]
        outputs = []
        for stream in range(parallel["streams"] if parallel else 1):
            outputs.append(self.stages([embedding[i] for i in ids], stream))
        xs = self.mix(outputs) if parallel else outputs[0]
        head = embedding if self.a["tie_word_embeddings"] else self.w["lm_head.weight"]
        return torch.stack([head @ self.norm("model.norm", x) for x in xs])

    def stages(self, xs: list[Tensor], stream: int) -> list[Tensor]:
        global_kvs: list[Any] = []
        crossing = sum(stage["layers"] for stage in self.a["stages"] if stage["attention"] == "cross")
        crossed = 0
        for s, stage in enumerate(self.a["stages"]):
            if stage["attention"] == "cross" and not global_kvs:
                global_kvs = [self.global_kv(xs, number) for number in range(self.a["global_kvs"])]
            for loop in range(stage["loops"]):
                before = xs
                for layer in range(stage["layers"]):
                    read = None
                    if stage["attention"] == "cross":
                        read = global_kvs[(crossed + layer) * len(global_kvs) // crossing]
                    xs = self.block(f"model.stages.{s}.layers.{layer}", stage["attention"], xs, stream, read)
                if loop and stage["loop_gate"] is not None:
                    gates = self.w[f"model.stages.{s}.loop_gates"]
                    gate = gates[min(loop - 1, len(gates) - 1)]
                    xs = [h + gate * (f - h) for h, f in zip(before, xs, strict=True)]
            crossed += stage["layers"] if stage["attention"] == "cross" else 0
        return xs

    def block(self, name: str, kind: str, xs: list[Tensor], stream: int, global_kv: Any) -> list[Tensor]:
        normed = [self.norm(f"{name}.attn_norm", x) for x in xs]
        if kind == "cross":
            attended = self.cross(f"{name}.attn", normed, global_kv)
        elif kind == "retention":
            attended = self.retention(f"{name}.attn", normed)
        else:
            attended = self.self_attention(f"{name}.attn", normed, self.a["window"] if kind == "sliding" else None, stream)
        ys = [x + out for x, out in zip(xs, attended, strict=True)]
        return [y + self.feed_forward(f"{name}.mlp", self.norm(f"{name}.mlp_norm", y)) for y in ys]

    # attention

    def self_attention(self, name: str, xs: list[Tensor], window: int | None, stream: int) -> list[Tensor]:
        queries = [self.project(f"{name}.q_proj", x, self.heads, n, f"{name}.q_norm") for n, x in enumerate(xs)]
        keys = [self.project(f"{name}.k_proj", x, self.kv_heads, n, f"{name}.k_norm") for n, x in enumerate(xs)]
        values = [self.project(f"{name}.v_proj", x, self.kv_heads) for x in xs]
        prefix_keys: list[Tensor] = []
        prefix_values: list[Tensor] = []
        if self.a["parallel"]:
            own = slice(stream * self.kv_heads, (stream + 1) * self.kv_heads)
            prefix_keys = [row[own] for row in self.w[f"{name}.prefix_keys"]]
            prefix_values = [row[own] for row in self.w[f"{name}.prefix_values"]]
        outputs = []
        for n, query in enumerate(queries):
            first = 0 if window is None else max(0, n - window + 1)
            seen_keys = prefix_keys + keys[first : n + 1]
            seen_values = prefix_values + values[first : n + 1]
            outputs.append(self.w[f"{name}.o_proj.weight"] @ self.softmax_attention(query, seen_keys, seen_values))
        return outputs

    def global_kv(self, xs: list[Tensor], number: int) -> tuple[list[Tensor], list[Tensor]]:
        """One of several, whose weights lie one behind the other."""
        name = "model.global_kv"
        keys, values = [], []
        for n, x in enumerate(xs):
            x = self.norm(f"{name}.norm", x)
            position = n if self.a["rope_cross"] else None
            keys.append(self.project(f"{name}.k_proj", x, self.kv_heads, position, f"{name}.k_norm", part=number))
            values.append(self.project(f"{name}.v_proj", x, self.kv_heads, part=number))
        return keys, values

    def cross(self, name: str, xs: list[Tensor], global_kv: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
        keys, values = global_kv
        outputs = []
        for n, x in enumerate(xs):
            position = n if self.a["rope_cross"] else None
            query = self.project(f"{name}.q_proj", x, self.heads, position, f"{name}.q_norm")
            out = self.softmax_attention(query, keys[: n + 1], values[: n + 1])
            outputs.append(self.w[f"{name}.o_proj.weight"] @ out)
        return outputs

    def softmax_attention(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        outputs = []
        for head in range(self.heads):
            shared = head // (self.heads // self.kv_heads)
            scores = torch.stack([key[shared] for key in keys]) @ query[head] / math.sqrt(self.a["head_dim"])
            weights = torch.exp(scores - scores.max())
            outputs.append(weights / weights.sum() @ torch.stack([value[shared] for value in values]))
        return torch.cat(outputs)

    def retention(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        """S_n = gamma_n S_(n-1) + k_n^T v_n, o_n = q_n S_n; output W_O (swish(x W_G) * norm(o))."""
        size = self.a["head_dim"]
        states = [torch.zeros(size, size, dtype=xs[0].dtype) for _ in range(self.heads)]
        outputs = []
        for n, x in enumerate(xs):
            query = self.project(f"{name}.q_proj", x, self.heads, n)
            key = self.project(f"{name}.k_proj", x, self.kv_heads, n) / math.sqrt(size)
            value = self.project(f"{name}.v_proj", x, self.kv_heads)
            gammas = torch.sigmoid(self.w[f"{name}.decay_proj.weight"] @ x) ** (1 / RETENTION_TEMPERATURE)
            heads = []
            for head in range(self.heads):
                shared = head // (self.heads // self.kv_heads)
                states[head] = gammas[head] * states[head] + torch.outer(key[shared], value[shared])
                out = query[head] @ states[head]
                heads.append(out / torch.sqrt((out**2).mean() + self.a["rms_norm_eps"]))
            gate = self.w[f"{name}.gate_proj.weight"] @ x
            outputs.append(self.w[f"{name}.o_proj.weight"] @ (gate * torch.sigmoid(gate) * torch.cat(heads)))
        return outputs

    def project(
        self, name: str, x: Tensor, heads: int, position: int | None = None, norm: str | None = None, part: int = 0
    ) -> Tensor:
        """Project to (heads, head_dim), normalise if the architecture has QK norms, rotate if there is a position.

        Args:
            part: which of several projections that lie one behind the other.
        """
        size = self.a["head_dim"]
        rows = slice(part * heads * size, (part + 1) * heads * size)
        y = self.w[f"{name}.weight"][rows] @ x
        if self.a["attention_bias"]:
            module, layer = name.rsplit(".", 1)
            y = y + self.w[f"{module}.{layer[0]}_bias"][rows]
        y = y.reshape(heads, size)
        if norm and self.a["qk_norm"]:
            weights = self.w[f"{norm}.weight"].reshape(-1, size)[part]
            y = torch.stack([row / torch.sqrt((row**2).mean() + self.a["rms_norm_eps"]) * weights for row in y])
        return y if position is None else torch.stack([self.rotate(row, position) for row in y])

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """RoPE: components i and i + head_dim / 2 are the two coordinates of a plane that is rotated."""
        first, second = x.chunk(2)
        angles = [position * self.frequency(i, len(x)) for i in range(len(first))]
        cos, sin = (torch.tensor([function(angle) for angle in angles], dtype=x.dtype) for function in (math.cos, math.sin))
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin])
        return turned * (self.a["rotary_scaling"] or {"attention_factor": 1.0})["attention_factor"]

    def frequency(self, i: int, size: int) -> float:
        """Of one plane, in radians per position. The only scaling here is YaRN's, without rounding."""
        theta, scaling = self.a["rope_theta"], self.a["rotary_scaling"]
        frequency: float = theta ** (-2 * i / size)
        if scaling is None:
            return frequency
        assert scaling["type"] == "yarn" and not scaling["truncate"]

        def plane(turns: float) -> float:
            """Where a plane would lie that turns so often within the original length."""
            return size * math.log(scaling["original_length"] / (2 * math.pi * turns)) / (2 * math.log(theta))

        first, last = max(plane(scaling["high_turns"]), 0), min(plane(scaling["low_turns"]), size - 1)
        divided = min(max((i - first) / (last - first), 0), 1)
        return frequency * (1 - divided) + frequency / scaling["factor"] * divided

    # the rest

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean() + self.a["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        experts = self.a["experts"]
        if not experts:
            return self.swiglu(name, x)
        scores = torch.sigmoid(self.w[f"{name}.router.weight"] @ x)
        biased = (scores + self.w[f"{name}.choice_bias"]).tolist()
        order = sorted(range(len(biased)), key=lambda e: -biased[e])
        chosen = order[: experts["experts_per_token"]]
        total = sum(scores[e] for e in chosen)
        out = self.swiglu(f"{name}.shared", x) if experts["shared_experts"] else torch.zeros_like(x)
        for e in chosen:
            gate, up = (x @ self.w[f"{name}.gate_up_proj"][e]).split(experts["intermediate_size"])
            out = out + scores[e] / total * ((gate * torch.sigmoid(gate) * up) @ self.w[f"{name}.down_proj"][e])
        return out

    def swiglu(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.w[f"{name}.gate_proj.weight"] @ x, self.w[f"{name}.up_proj.weight"] @ x
        return self.w[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def mix(self, streams: list[list[Tensor]]) -> list[Tensor]:
        """ParScale: a weighted sum of the streams, whose weights a small network computes and which are smoothed."""
        smoothing, name = self.a["parallel"]["smoothing"], "model.stream_mixer"
        mixed = []
        for xs in zip(*streams, strict=True):
            hidden = self.w[f"{name}.hidden_proj.weight"] @ torch.cat(xs)
            weights = torch.softmax(self.w[f"{name}.weight_proj.weight"] @ (hidden * torch.sigmoid(hidden)), 0)
            weights = weights * (1 - smoothing) + smoothing / len(xs)
            mixed.append(sum(weight * x for weight, x in zip(weights, xs, strict=True)))
        return mixed
