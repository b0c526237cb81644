"""The causal language model in vLLM, for every architecture that vLLM can express, from its list of stages.

- A stage owns one cache per (loop, layer); vLLM's hybrid cache manager frees the blocks that windows have left.
- The global KV has one owner, which writes and never attends; all cross layers read from it.
- With `--kv-sharing-fast-prefill` a prompt leaves before the cross-decoder, which runs on the rows that are sampled from.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import AutoWeightsLoader

from yoco_u.errors import UserError
from yoco_u.integrations.vllm.decoders import CrossDecoder, SelfDecoder
from yoco_u.integrations.vllm.support import served_architecture
from yoco_u.integrations.vllm.weights import weights_mapper


class YocoUForCausalLM(nn.Module):
    """Two compiled parts, the write of the global KV between them, and a head."""

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
        self.architecture = a
        stored = config.architecture.stages
        gates = [stage.loops - 1 if stage.loop_gate is not None else 0 for stage in stored]
        with set_model_tag("self_decoder"):
            self.self_decoder = SelfDecoder(vllm_config=vllm_config, architecture=a, gates=gates)
        self.cross_decoder = None
        if self.self_decoder.global_kv is not None:
            writer = self.self_decoder.global_kv.writer
            with set_model_tag("cross_decoder"):
                self.cross_decoder = CrossDecoder(
                    vllm_config=vllm_config, architecture=a, gates=gates,
                    first_slot=self.self_decoder.slots, writer=writer.layer_name,
                )  # fmt: skip
            self.writer, self.reader = writer.layer_name, self.cross_decoder.reader
            # Where a graph is replayed, its inputs must lie where they lay when it was captured.
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.kept = torch.empty(tokens, a.hidden_size)
            self.kept_positions = torch.zeros(tokens, dtype=torch.int64)
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
        """Final hidden states, (tokens, hidden); with fast prefill, of the rows that are sampled from, and zeros."""
        if self.cross_decoder is None:
            return self.self_decoder(input_ids, positions, inputs_embeds)
        x, keys, values = self.self_decoder(input_ids, positions, inputs_embeds)
        unified_kv_cache_update(keys, values, self.writer)
        rows, sampled = self._kept_rows()
        if rows is None:
            return self.cross_decoder(*self._in_place(x, positions))
        out = self.cross_decoder(*self._in_place(x[rows], positions[rows]))
        everywhere = torch.zeros_like(x)
        everywhere[rows[:sampled]] = out[:sampled]
        return everywhere

    def _kept_rows(self) -> tuple[Tensor | None, int]:
        """Rows that the cross-decoder runs on, filled up to a size that graphs know, and how many are real; None for all."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a dry run
            return None, 0
        of_reader = metadata[self.reader]
        return getattr(of_reader, "logits_indices_padded", None), getattr(of_reader, "num_logits_indices", None) or 0

    def _in_place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        tokens = len(x)
        return self.kept[:tokens].copy_(x), self.kept_positions[:tokens].copy_(positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=weights_mapper(self.architecture))
