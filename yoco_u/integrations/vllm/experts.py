"""The mixture of experts on vLLM's fused experts."""

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ReplicatedLinear

from yoco_u.architecture import Architecture


class ExpertMixture(nn.Module):
    """The mixture of `yoco_u.model.feed_forward.ExpertMixture`: the same scores, choice and weights.

    Args:
        name: unique name for vLLM's fused experts. It must end in `experts`, by which vLLM recognises their tensors.
        shared: the shared experts as one SwiGLU, whose outputs are not yet added up over the ranks; None without any.
    """

    def __init__(self, a: Architecture, name: str, shared: nn.Module | None) -> None:
        super().__init__()
        experts = a.experts
        assert experts is not None
        self.router = ReplicatedLinear(
            a.hidden_size, experts.num_experts, bias=False, params_dtype=torch.float32, return_bias=False
        )
        self.choice_bias = nn.Parameter(torch.zeros(experts.num_experts, dtype=torch.float32), requires_grad=False)
        self.shared = shared
        # On CPUs vLLM takes sigmoid scores and a bias only where experts are chosen by groups, so all experts are one group.
        self.experts = FusedMoEFactory(
            num_experts=experts.num_experts,
            top_k=experts.experts_per_token,
            hidden_size=a.hidden_size,
            intermediate_size=experts.intermediate_size,
            renormalize=True,
            use_grouped_topk=True,
            num_expert_group=1,
            topk_group=1,
            scoring_func="sigmoid",
            e_score_correction_bias=self.choice_bias,
            shared_experts=shared,
            is_fused_checkpoint_transposed=True,
            router_logits_dtype=torch.float32,
            prefix=name,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)"""
        return self.experts(hidden_states=x, router_logits=self.router(x.float()))
