"""The feed-forward of a block: SwiGLU, or a fine-grained mixture of SwiGLU experts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_u.architecture import MixtureOfExperts
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.layers import ResidualLinear, autocast_dtype, project, without_autocast


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)` (arXiv 2002.05202), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = ResidualLinear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Router(nn.Linear):
    """The scores of the experts before the sigmoid, computed in float32 whatever the dtype of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, experts), float32"""
        with without_autocast(x.device):
            return F.linear(x.float(), self.weight.float())


class ExpertMixture(nn.Module):
    """Each token visits its best `experts_per_token` experts and all shared ones; no token is dropped.

    Scores are sigmoids of a float32 router. The scores of the chosen experts, scaled to sum to 1, weigh their outputs. Tokens
    are sorted by expert, so that all experts run as one grouped matrix product.

    Two ways to balance the load can be used alone or together, see `MixtureOfExperts`: a bias that is added to the scores for
    the choice of experts only (arXiv 2408.15664), and an auxiliary loss (arXiv 2101.03961, eq. 4). `tokens_per_expert` counts
    the visits since the last step. With gradient checkpointing, which runs blocks twice, every visit counts twice; that does
    not change the balance.
    """

    def __init__(self, hidden_size: int, experts: MixtureOfExperts) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = experts.num_experts, experts.experts_per_token
        self.auxiliary_loss_weight, self.bias_update_rate = experts.auxiliary_loss_weight, experts.bias_update_rate
        inner = experts.intermediate_size
        self.router = Router(hidden_size, experts.num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts.num_experts, hidden_size, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts.num_experts, inner, hidden_size))
        self.shared = SwiGLU(hidden_size, inner * experts.shared_experts) if experts.shared_experts else None
        self.choice_bias = nn.Buffer(torch.zeros(experts.num_experts))
        self.tokens_per_expert = nn.Buffer(torch.zeros(experts.num_experts, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., hidden) -> outputs of the same shape, and the weighted auxiliary loss of these tokens, or None without one."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = torch.sigmoid(self.router(tokens))  # (tokens, experts)
        chosen = (scores + self.choice_bias).topk(self.experts_per_token, dim=-1).indices  # (tokens, experts_per_token)
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)

        visited, order = chosen.flatten().sort(stable=True)  # (tokens * experts_per_token,), grouped by expert
        ends = torch.searchsorted(visited, torch.arange(self.num_experts, device=x.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))  # not by bincount, which waits for a GPU
        if self.training:
            self.tokens_per_expert.add_(counts)
        out = self._experts(tokens, order, weights, ends.to(torch.int32))
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view_as(x), self._auxiliary_loss(scores, counts)

    def _experts(self, tokens: Tensor, order: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        dtype = autocast_dtype(tokens.device) or tokens.dtype
        visits = tokens.to(dtype)[order // self.experts_per_token]
        gate, up = _grouped_product(visits, self.gate_up_proj.to(dtype), ends).chunk(2, dim=-1)
        visits = _grouped_product(F.silu(gate) * up, self.down_proj.to(dtype), ends)
        visits = visits[order.argsort()].view(*weights.shape, -1)  # (tokens, experts_per_token, hidden)
        return (visits * weights.to(dtype)[..., None]).sum(dim=1)

    def _auxiliary_loss(self, scores: Tensor, counts: Tensor) -> Tensor | None:
        if not (self.training and self.auxiliary_loss_weight):
            return None
        share_of_visits = counts / counts.sum()
        share_of_score = (scores / scores.sum(-1, keepdim=True)).mean(dim=0)
        return self.auxiliary_loss_weight * self.num_experts * (share_of_visits * share_of_score).sum()

    @torch.no_grad()
    def balance(self) -> None:
        """Move the choice bias one step towards an even load, and reset the counts; called after each optimizer step."""
        if self.bias_update_rate:
            overloaded = self.tokens_per_expert - self.tokens_per_expert.double().mean()
            self.choice_bias.sub_(self.bias_update_rate * overloaded.sign())
        self.tokens_per_expert.zero_()


def balance(mixtures: Sequence[ExpertMixture], sum_over_ranks: Callable[[Tensor], object]) -> None:
    """Balance each mixture by the load of all micro-batches and ranks of an optimizer step.

    Args:
        sum_over_ranks: sums a tensor over the ranks, in place.
    """
    if not mixtures:
        return
    counts = torch.stack([mixture.tokens_per_expert for mixture in mixtures])  # (mixtures, experts)
    sum_over_ranks(counts)
    for mixture, count in zip(mixtures, counts, strict=True):
        mixture.tokens_per_expert.copy_(count)
        mixture.balance()


def _grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows 0 .. ends[0] - 1 by weights[0], rows ends[0] .. ends[1] - 1 by weights[1], and so on."""
    if torch.compiler.is_compiling():
        return traced_grouped_product(x, weights, ends)
    return F.grouped_mm(x, weights, offs=ends)


def experts_wait(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether experts make the host wait for a GPU, as no CUDA graph can.

    torch multiplies groups in one kernel in bfloat16 on compute capabilities 9 and 10 alone (`_grouped_mm_cuda` in its
    `aten/src/ATen/native/cuda/GroupedBlas.cpp`); elsewhere it reads where the groups end, and multiplies one after the other.
    """
    if device.type != "cuda":
        return False
    in_one_kernel = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return not (in_one_kernel and dtype == torch.bfloat16)


@torch.library.custom_op("yoco_u::grouped_product", mutates_args=())
def traced_grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`_grouped_product` for torch.compile and torch.export: torch 2.13 runs the product in float32 but does not trace it."""
    return F.grouped_mm(x, weights, offs=ends)


@torch.library.custom_op("yoco_u::grouped_product_backward", mutates_args=())
def traced_grouped_product_backward(grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return F.grouped_mm(grad, weights.transpose(-1, -2), offs=ends), F.grouped_mm(x.T, grad, offs=ends)


@traced_grouped_product.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


@traced_grouped_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*traced_grouped_product_backward(grad.contiguous(), *ctx.saved_tensors), None)


traced_grouped_product.register_autograd(_backward, setup_context=_save)


def feed_forward(config: YocoUConfig) -> nn.Module:
    """The feed-forward of a block, as the config has it."""
    architecture = config.architecture
    if architecture.experts is None:
        return SwiGLU(architecture.hidden_size, architecture.intermediate_size)
    return ExpertMixture(architecture.hidden_size, architecture.experts)
