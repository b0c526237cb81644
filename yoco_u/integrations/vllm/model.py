"""The causal language model in vLLM, built from an architecture's list of stages.

- Each slot, that is each (stage, loop, layer) that writes, owns one cache. vLLM's hybrid cache manager frees the blocks of a
  sliding one that its window has left.
- A global KV has one owner, which writes and never attends; cross layers read from it.
- With `--kv-sharing-fast-prefill` the cross-decoder runs only on the rows that are sampled from: a prompt exits early.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import AutoWeightsLoader

from yoco_u.errors import UserError
from yoco_u.integrations.vllm.attention import AttentionLayers
from yoco_u.integrations.vllm.backend import VllmBackend
from yoco_u.integrations.vllm.decoders import CrossDecoder, SelfDecoder
from yoco_u.integrations.vllm.support import served_architecture
from yoco_u.integrations.vllm.weights import weights_mapper


class YocoUForCausalLM(nn.Module):
    """Two compiled parts, the write of the global KVs between them, and a head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the model.

        Raises:
            UserError: for what vLLM, this plugin or the attention backend cannot do.
        """
        super().__init__()
        config = vllm_config.model_config.hf_config
        a = served_architecture(config)
        if vllm_config.quant_config is not None:
            raise UserError("quantization was asked for, which the plugin does not pass on to its layers; drop --quantization")
        if vllm_config.model_config.runner_type != "generate":
            runner = vllm_config.model_config.runner_type
            raise UserError(f"the runner is {runner}, but the plugin's models generate text; drop --runner and --convert")
        if a.experts is not None and a.looped_stages and not vllm_config.model_config.enforce_eager:
            raise UserError(
                "this checkpoint has a mixture of experts in a looped stage, for which vLLM gives wrong tokens if it compiles "
                "the model; add --enforce-eager"
            )
        self.architecture = a
        stored = config.architecture.stages
        gates = [stage.loops - 1 if stage.loop_gate is not None else 0 for stage in stored]
        self.attention = AttentionLayers(a, vllm_config)
        with set_model_tag("self_decoder"):
            self.self_decoder = SelfDecoder(architecture=a, gates=gates, attention=self.attention)
        self.cross_decoder = None
        if a.has_global_kv:
            with set_model_tag("cross_decoder"):
                self.cross_decoder = CrossDecoder(architecture=a, gates=gates, attention=self.attention)
            # Where a graph is replayed, its inputs must lie where they lay when it was captured.
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.cross_input = torch.empty(tokens, a.hidden_size)
            self.cross_positions = torch.zeros(tokens, dtype=torch.int64)
        self.lm_head = ParallelLMHead(a.vocab_size, a.hidden_size)
        if a.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.self_decoder.embed_tokens)
        self.logits_processor = LogitsProcessor(a.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.self_decoder.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, (tokens, hidden). With fast prefill they are zeros in the rows that are not sampled from."""
        if self.cross_decoder is None:
            return self.self_decoder(input_ids, positions, inputs_embeds)
        x, *written = self.self_decoder(input_ids, positions, inputs_embeds)
        backend = VllmBackend(self.attention)
        backend.global_kvs(list(zip(written[::2], written[1::2], strict=True)))
        kept, backend = backend.kept()
        if kept is None:
            return self.cross_decoder(*self._in_place(x, positions))
        out = self.cross_decoder(*self._in_place(x[kept], positions[kept]))
        everywhere = torch.zeros_like(x)
        everywhere[kept[: backend.sampled]] = out[: backend.sampled]
        return everywhere

    def _in_place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-decoder's inputs, copied to where its graphs expect them."""
        tokens = len(x)
        return self.cross_input[:tokens].copy_(x), self.cross_positions[:tokens].copy_(positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=weights_mapper(self.architecture))
