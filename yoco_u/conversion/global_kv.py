"""The keys and values of the cross-decoder, from those of the layers that it replaces.

The replaced layers computed keys and values from their own inputs; the cross-decoder computes them from the self-decoder's
output alone. What each method needs of the activations is in `Moments`: sums over tokens, which take the same memory for any
number of them. Keys are those before RoPE.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yoco_u.architecture import Architecture
from yoco_u.conversion.shared_kv import SharedKV, share
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.blocks import Block, GlobalKVProjection, SelfAttention

Method = Literal["mean", "best", "fit"]
METHODS: tuple[Method, ...] = ("mean", "best", "fit")
RIDGE = 1e-7
"""Added to the normal equations, as a share of the mean eigenvalue, so that few tokens do not fit noise."""


@dataclass
class Moments:
    """Sums over tokens of products of the border state and each layer's keys and values, in float64.

    The border state is the self-decoder's output after RMSNorm without weights, with a 1 behind it if there are biases.

    Attributes:
        states: (features, features).
        products: of each layer, the states' products with its keys and values, (features, keys and values).
        sums: of each layer, of its keys and values, (keys and values,).
        squares: of each layer, of their squares, (keys and values,).
        tokens: how many there were.
    """

    states: Tensor
    products: list[Tensor]
    sums: list[Tensor]
    squares: list[Tensor]
    tokens: int = 0

    def explained(self, layer: int, weights: Tensor) -> float:
        """Share of the variance of a layer's keys and values that `states @ weights.T` explains; negative if worse than a mean.

        Args:
            weights: (keys and values, features).
        """
        w = weights.double().T
        error = self.squares[layer] - 2 * (w * self.products[layer]).sum(0) + (w * (self.states @ w)).sum(0)
        variance = self.squares[layer] - self.sums[layer] ** 2 / self.tokens
        return float(1 - error.sum() / variance.sum())

    def least_squares(self, layer: int) -> Tensor:
        """The weights that explain a layer's keys and values best, (keys and values, features)."""
        return torch.linalg.solve(self._regular_states, self.products[layer]).T

    def shared(self, layers: list[int], own: list[Block], kv_heads: int, head_dim: int) -> SharedKV:
        """The global KV that serves some layers best, see `yoco_u.conversion.shared_kv`.

        Args:
            own: these layers' blocks.
        """
        queries, outputs = [], []
        for block in own:
            attention: Any = block.attn
            rows = (attention.q_proj.weight * block.attn_norm.weight).square().sum(-1).view(kv_heads, -1, 2, head_dim // 2)
            queries.append(rows.sum((1, 2)))
            out = attention.o_proj.weight.view(-1, kv_heads, rows.shape[1], head_dim)
            outputs.append(torch.einsum("okhd,okhe->kde", out, out))
        weights, states = [self.least_squares(layer) for layer in layers], self._regular_states / self.tokens
        return share(weights, states, torch.stack(queries), torch.stack(outputs), attention.q_norm is None)

    @property
    def _regular_states(self) -> Tensor:
        return self.states + RIDGE * self.states.diagonal().mean() * torch.eye(len(self.states), dtype=torch.float64)


def own_weights(model: YocoUForCausalLM, layer: nn.Module, number: int) -> tuple[Tensor, Tensor | None]:
    """What computes a layer's keys and values from a state after RMSNorm without weights.

    Args:
        layer: a block with softmax attention.
        number: which global KV it reads, if it is a cross block.

    Returns:
        weights, (keys and values, hidden), keys first, and biases or None.
    """
    assert isinstance(layer, Block)
    module: Any
    if isinstance(layer.attn, SelfAttention):
        module, scale = layer.attn, layer.attn_norm.weight
        rows = slice(None)
    else:
        assert isinstance(model.model.global_kv, GlobalKVProjection)
        module, scale = model.model.global_kv, model.model.global_kv.norm.weight
        size = module.k_proj.out_features // model.model.architecture.global_kvs
        rows = slice(number * size, (number + 1) * size)
    weights = torch.cat([module.k_proj.weight[rows], module.v_proj.weight[rows]]) * scale
    biases = torch.cat([module.k_bias[rows], module.v_bias[rows]]) if module.has_bias else None
    return weights.detach(), None if biases is None else biases.detach()


@torch.no_grad()
def write_global_kvs(
    target: YocoUForCausalLM, source: YocoUForCausalLM, method: Method, moments: Moments | None
) -> list[Tensor]:
    """Set the weights of a model's global KVs, and what its cross blocks make of them.

    Args:
        target: its other weights are set already.
        source: the model with the layers that are replaced.
        method: `mean` of the layers' own projections, each applied to the border state; `best`: the one of these that explains
            its group's keys and values best; `fit`: least squares, of what the layers of a group can share.
        moments: of the replaced layers; needed by `best` and `fit`.

    Returns:
        Of each cross block, what gives the keys and values it works with from the border state, (keys and values, features).
    """
    a, projection = target.model.architecture, target.model.global_kv
    assert isinstance(projection, GlobalKVProjection)
    replaced, places = list(_cross_blocks(source, a)), list(_cross_places(a))
    groups: list[list[int]] = [[] for _ in range(a.global_kvs)]
    for index, (stage, layer) in enumerate(places):
        groups[a.global_kv_of(stage, layer)].append(index)
    worked_with: dict[int, Tensor] = {}
    keys = a.num_key_value_heads * a.head_dim
    projection.norm.weight.fill_(1.0)
    for number, layers in enumerate(groups):
        own = [own_weights(source, *replaced[layer]) for layer in layers]
        joined = [w if b is None else torch.cat([w, b[:, None]], dim=1) for w, b in own]
        if method == "mean":
            weights = torch.stack(joined).mean(0)
        else:
            assert moments is not None
            known = moments
            if method == "best":
                weights = max(joined, key=lambda one: sum(known.explained(layer, one) for layer in layers))
            elif len(layers) == 1:
                weights = known.least_squares(*layers)
            else:
                new = [block_at(target, *places[layer]) for layer in layers]
                found = known.shared(layers, new, a.num_key_value_heads, a.head_dim)
                weights = found.weights
                for index, (layer, block) in enumerate(zip(layers, new, strict=True)):
                    found.take_over(index, block.attn)
                    worked_with[layer] = found.of_layer(index)
        for layer in layers:
            worked_with.setdefault(layer, weights)
        weights = weights.to(projection.k_proj.weight.dtype)
        rows = slice(number * keys, (number + 1) * keys)
        for index, (linear, name) in enumerate(((projection.k_proj, "k"), (projection.v_proj, "v"))):
            part = weights[index * keys : (index + 1) * keys]
            linear.weight[rows] = part[:, : a.hidden_size]
            if projection.has_bias:
                getattr(projection, f"{name}_bias")[rows] = part[:, a.hidden_size]
        if projection.k_norm is not None:
            norms = [_key_norm(source, *replaced[layer], a.head_dim) for layer in layers]
            projection.k_norm.weight.view(-1, a.head_dim)[number] = torch.stack(norms).mean(0)
    return [worked_with[layer] for layer in range(len(places))]


@torch.no_grad()
def collect(
    target: YocoUForCausalLM, source: YocoUForCausalLM, rows: Tensor, advance: Callable[[int], None] = lambda _: None
) -> Moments:
    """Run both models on rows of tokens: the target gives the border states, the source each replaced layer's keys and values.

    Args:
        rows: (rows, tokens).
        advance: called with the number of tokens that were read since the last call.
    """
    a = target.model.architecture
    replaced = list(_cross_blocks(source, a))
    features, size = a.hidden_size + a.attention_bias, 2 * a.num_key_value_heads * a.head_dim
    zeros = [torch.zeros(features, size, dtype=torch.float64) for _ in replaced]
    sums = [torch.zeros(size, dtype=torch.float64) for _ in replaced]
    moments = Moments(torch.zeros(features, features, dtype=torch.float64), zeros, sums, [one.clone() for one in sums])
    with ExitStack() as hooks:
        border = _Catcher(hooks, target.model.global_kv)
        catchers = [_KeyValues(hooks, source, block, number) for block, number in replaced]
        for ids in rows:
            target.model(ids[None], use_cache=False, logits_to_keep=1)
            source.model(ids[None], use_cache=False)
            x = border.inputs[0].double()
            x = x / (x.square().mean(-1, keepdim=True) + a.rms_norm_eps).sqrt()
            if a.attention_bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            moments.states += x.T @ x
            for layer, catcher in enumerate(catchers):
                y = catcher.keys_and_values().double()
                moments.products[layer] += x.T @ y
                moments.sums[layer] += y.sum(0)
                moments.squares[layer] += y.square().sum(0)
            moments.tokens += len(x)
            advance(len(x))
    return moments


class _Catcher:
    """Keeps a module's input of the last forward pass, (tokens, hidden)."""

    def __init__(self, hooks: ExitStack, module: nn.Module | None) -> None:
        assert module is not None
        self.inputs: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, arguments: self._keep(arguments[0]))
        hooks.callback(handle.remove)

    def _keep(self, x: Tensor) -> None:
        self.inputs = [x[0]]


class _KeyValues:
    """Computes again a block's keys and values of the last forward pass, before norms and RoPE."""

    def __init__(self, hooks: ExitStack, model: YocoUForCausalLM, block: nn.Module, number: int) -> None:
        self.weights, self.biases = own_weights(model, block, number)
        inside = isinstance(block, Block) and isinstance(block.attn, SelfAttention)
        self.catcher = _Catcher(hooks, block if inside else model.model.global_kv)
        self.eps = model.model.architecture.rms_norm_eps

    def keys_and_values(self) -> Tensor:
        """(tokens, keys and values)"""
        x = self.catcher.inputs[0]
        y = nn.functional.rms_norm(x, (x.shape[-1],), eps=self.eps) @ self.weights.T
        return y if self.biases is None else y + self.biases


def _cross_places(a: Architecture) -> Iterator[tuple[int, int]]:
    """Stage and layer of each cross block."""
    for number, stage in enumerate(a.stages):
        if stage.attention == "cross":
            yield from ((number, layer) for layer in range(stage.layers))


def _cross_blocks(source: YocoUForCausalLM, target: Architecture) -> Iterator[tuple[nn.Module, int]]:
    """The source's block in the place of each cross block of the target, and the global KV that it reads, if it is one too."""
    a, places = source.model.architecture, blocks(source)
    for stage, layer in places[len(places) - target.cross_layers :]:
        number = a.global_kv_of(stage, layer) if a.stages[stage].attention == "cross" else 0
        yield block_at(source, stage, layer), number


def blocks(model: YocoUForCausalLM) -> list[tuple[int, int]]:
    """Stage and layer of each block, in order; loops do not count."""
    return [(number, layer) for number, stage in enumerate(model.model.architecture.stages) for layer in range(stage.layers)]


def block_at(model: YocoUForCausalLM, stage: int, layer: int) -> Any:
    """A block, see `yoco_u.model.blocks.Block`."""
    return model.model.get_submodule(f"stages.{stage}.layers.{layer}")


def _key_norm(source: YocoUForCausalLM, block: nn.Module, number: int, head_dim: int) -> Tensor:
    assert isinstance(block, Block)
    if isinstance(block.attn, SelfAttention):
        assert block.attn.k_norm is not None
        return block.attn.k_norm.weight.detach()
    assert isinstance(source.model.global_kv, GlobalKVProjection) and source.model.global_kv.k_norm is not None
    return source.model.global_kv.k_norm.weight.detach().view(-1, head_dim)[number]
