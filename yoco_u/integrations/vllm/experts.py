"""The mixture of experts on vLLM's fused experts."""

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ReplicatedLinear

from yoco_u.architecture import Architecture


class ExpertMixture(nn.Module):
    """Sigmoid scores of a float32 router, a bias that only the choice sees, chosen scores scaled to sum to 1.

    Args:
        name: of the fused experts, unique; it must end in `experts`, by which vLLM recognises their tensors.
        shared: the shared experts, not reduced over the ranks.
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
        # One group of all experts is how vLLM spells a choice without groups that has a bias.
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
        """(tokens, hidden) -> the same."""
        return self.experts(hidden_states=x, router_logits=self.router(x.float()))
