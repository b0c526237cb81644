"""One global KV for several layers: what is common to the layers' keys and values, and what each layer makes of it.

Each layer's own keys and values are linear in the border state x, by least squares. A layer may scale and turn shared keys, two
elements that RoPE rotates together by one complex factor, since its queries can take the factor over:
`<q, c k> = <conj(c) q, k>`, for rotated q and k too. It may map shared values by any matrix, since its output projection can
take that over. What is shared is then a problem of low rank, solved by singular vectors (Eckart and Young, 1936): of all
choices, the one with the least squared error of scores and outputs, where all keys are looked at alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yoco_u.model.blocks import CrossAttention


@dataclass(frozen=True)
class SharedKV:
    """A global KV of several layers.

    Attributes:
        keys: what gives the shared keys from x, (kv_heads, head_dim, features).
        values: the same for values.
        factors: of each layer, by what its own keys are shared keys: complex, (layers, kv_heads, head_dim / 2).
        maps: of each layer, by what its own values are shared values, (layers, kv_heads, head_dim, head_dim).
    """

    keys: Tensor
    values: Tensor
    factors: Tensor
    maps: Tensor

    @property
    def weights(self) -> Tensor:
        """(keys and values, features)"""
        return torch.cat([self.keys.flatten(0, 1), self.values.flatten(0, 1)])

    def of_layer(self, index: int) -> Tensor:
        """What gives a layer's own keys and values from x, as far as these are shared: (keys and values, features)."""
        keys = _real(self.factors[index][..., None] * _complex(self.keys))
        return torch.cat([keys.flatten(0, 1), (self.maps[index] @ self.values).flatten(0, 1)])

    @torch.no_grad()
    def take_over(self, index: int, attention: CrossAttention) -> None:
        """Let a layer's queries and output projection make of the shared keys and values what it made of its own."""
        kv_heads, dim = self.keys.shape[:2]
        factors = self.factors[index].conj()[:, None]
        parts: list[Any] = [attention.q_proj.weight, *([attention.q_bias] if attention.has_bias else [])]
        for part in parts:
            queries = part.double().view(kv_heads, -1, dim, part[0].numel())
            part.copy_(_real(factors[..., None] * _complex(queries)).reshape(part.shape))
        out = attention.o_proj.weight
        heads = out.double().view(len(out), kv_heads, -1, dim)
        out.copy_(torch.einsum("okhd,kde->okhe", heads, self.maps[index]).reshape(out.shape))


def share(weights: Sequence[Tensor], states: Tensor, queries: Tensor, outputs: Tensor, turn_keys: bool) -> SharedKV:
    """Find the global KV that serves some layers best.

    Args:
        weights: of each layer, what gives its keys and values from x, (keys and values, features), keys first.
        states: the mean of x x^T, (features, features), positive definite.
        queries: of each layer, how strong its queries are, (layers, kv_heads, head_dim / 2), one number for both elements that
            RoPE rotates together.
        outputs: of each layer, its output projection's O^T O, summed over the heads that read a key-value head, (layers,
            kv_heads, head_dim, head_dim).
        turn_keys: if false, shared keys are the mean of the layers' keys, and factors are 1: for keys that a norm follows.
    """
    layers, kv_heads, dim = outputs.shape[:3]
    root = torch.linalg.cholesky(states.double())
    own = torch.stack([one.double() for one in weights]).view(layers, 2, kv_heads, dim, -1) @ root
    keys, values = own[:, 0], own[:, 1]

    of_keys = _complex(keys)  # (layers, kv_heads, dim / 2, features)
    strength = queries.double().sqrt()[..., None]
    if turn_keys:
        common = torch.linalg.svd((strength * of_keys).permute(1, 2, 0, 3), full_matrices=False).Vh[:, :, 0]
        factors = torch.einsum("lkpf,kpf->lkp", of_keys, common.conj())
    else:
        common, factors = of_keys.mean(0), torch.ones(of_keys.shape[:3], dtype=torch.complex128)

    seen = torch.einsum("lkde,lkef->lkdf", _square_root(outputs.double()), values)
    basis = torch.linalg.svd(seen.transpose(0, 1).flatten(1, 2), full_matrices=False).Vh[:, :dim]
    basis = torch.nn.functional.pad(basis, (0, 0, 0, dim - basis.shape[1]))  # heads may be wider than there are features
    maps = torch.einsum("lkdf,kef->lkde", values, basis)
    return SharedKV(_without(root, _real(common)), _without(root, basis), factors, maps)


def _without(root: Tensor, weights: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, weights, upper=False, left=False)


def _square_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def _complex(x: Tensor) -> Tensor:
    """(..., head_dim, n) -> (..., head_dim / 2, n): element i and element i + head_dim / 2 as one number."""
    return torch.complex(*x.double().chunk(2, dim=-2))


def _real(x: Tensor) -> Tensor:
    return torch.cat([x.real, x.imag], dim=-2)
