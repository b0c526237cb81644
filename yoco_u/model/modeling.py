"""The causal language model: one forward pass for every architecture.

- Stages run in order; a looped stage runs its blocks T times with the same weights.
- Before the first cross stage, the global KV is written once; the cross stages receive it as tensors.
- Cross stages run only on the positions whose logits are asked for, so most tokens of a prefill skip them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from yoco_u.architecture import Architecture, ParallelStreams
from yoco_u.device import host_waits, upload
from yoco_u.errors import UserError
from yoco_u.model.backend import AttentionBackend, prepare_backend
from yoco_u.model.blocks import Block, GlobalKVProjection, LoopedStack
from yoco_u.model.cache import YocoUCache
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.initialization import initialize
from yoco_u.model.layers import RMSNorm, autocast_dtype
from yoco_u.model.loss import IGNORED, chunk_loss, chunked_cross_entropy
from yoco_u.model.segments import check_cumulative_lengths, positions_of, segments_of


class YocoUPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about our models."""

    config: YocoUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": OutputRecorder(Block, index=0)}

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)


class StreamMixer(nn.Module):
    """Mixes the outputs of ParScale's streams; a small network computes the weights from all of them (arXiv 2505.10475)."""

    def __init__(self, config: YocoUConfig, parallel: ParallelStreams) -> None:
        super().__init__()
        self.streams, self.smoothing = parallel.streams, parallel.smoothing
        self.hidden_proj = nn.Linear(parallel.streams * config.hidden_size, config.hidden_size, bias=False)
        self.weight_proj = nn.Linear(config.hidden_size, parallel.streams, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, streams, hidden) -> (batch, tokens, hidden)"""
        weights = self.weight_proj(F.silu(self.hidden_proj(x.flatten(-2)))).float().softmax(dim=-1)
        weights = weights * (1 - self.smoothing) + self.smoothing / self.streams
        return (x * weights[..., None].to(x.dtype)).sum(dim=-2)


class YocoUModel(YocoUPreTrainedModel):
    """Embedding, stages, final norm: everything but the LM head."""

    def __init__(self, config: YocoUConfig) -> None:
        super().__init__(config)
        architecture = config.architecture
        self.architecture = architecture
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.stages = nn.ModuleList(LoopedStack(config, stage) for stage in architecture.stages)
        self.global_kv = GlobalKVProjection(config) if architecture.has_global_kv else None
        self.stream_mixer = StreamMixer(config, architecture.parallel) if architecture.parallel else None
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.gradient_checkpointing = False
        if architecture.experts:
            self._keep_in_fp32_modules_strict = ["choice_bias"]
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: YocoUCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_loops: int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states after the final norm, for the positions asked for.

        Args:
            input_ids: (batch, tokens); or inputs_embeds: (batch, tokens, hidden).
            attention_mask: (batch, cached + tokens), 0 where a token is padding, on either side.
            position_ids: positions for RoPE, (batch, tokens); by default the tokens of each document are counted from 0,
                without padding.
            past_key_values: the cache of an earlier call with the same loop count.
            document_ids: (batch, tokens), never decreasing; tokens of different documents do not see each other.
            cu_seqlens: where documents and padding begin, as `yoco_u.model.segments.cumulative_lengths` returns it,
                (sequences + 1,), int32, on the model's device. Flash attention on a GPU works by it; if it is not given, the
                GPU is waited for to find it in document_ids and attention_mask.
            num_loops: loop count T >= 1 of this call; the config's by default.
            logits_to_keep: the positions to return: the last n for an int n, all for 0, or those in a 1-D tensor of indices.
                The cross-decoder runs on these alone.

        Raises:
            UserError: if inputs contradict each other; the message names them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        architecture = self.architecture if num_loops is None else self.architecture.with_loops(num_loops)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and any(block.gradient_checkpointing for block in self.modules() if isinstance(block, Block)):
            use_cache, past_key_values = False, None
        if past_key_values is None and use_cache:
            past_key_values = YocoUCache(architecture)
        _check_cache(past_key_values, tuple(stage.loops for stage in architecture.stages), document_ids)

        batch, tokens = x.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        segments = segments_of(attention_mask, document_ids, (batch, tokens), past)
        check_cumulative_lengths(cu_seqlens, segments)
        if position_ids is None:
            position_ids = positions_of(attention_mask, segments if document_ids is not None else None, tokens, past, x.device)
        kept, last = _kept_positions(logits_to_keep, tokens, x.device)
        dtype = autocast_dtype(x.device) or x.dtype
        backend = prepare_backend(architecture, batch, position_ids, segments, kept, last, past_key_values, dtype, cu_seqlens)

        x, losses = self.run_stages(x, backend, architecture)
        output = BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)
        output["auxiliary_loss"] = sum(losses) if losses else None
        return output

    def run_stages(self, x: Tensor, backend: AttentionBackend, architecture: Architecture) -> tuple[Tensor, list[Tensor]]:
        """Run all stages and the final norm: the one forward pass of training, `generate()`, the engine and analysis.

        Args:
            x: embedded tokens, (batch, tokens, hidden).
            backend: attends, remembers keys and values, and knows which tokens are kept (their logits are asked for).
            architecture: the model's own, with the loop count of this pass.

        Returns:
            Hidden states of the kept tokens after the final norm, (batch, kept, hidden), and the auxiliary losses of blocks.
        """
        x = self.streams(x)
        global_kv, slot, losses = None, 0, []
        for stack, stage in zip(self.stages, architecture.stages, strict=True):
            if stage.attention == "cross" and global_kv is None:
                assert self.global_kv is not None
                global_kv = backend.global_kv(*self.global_kv(x, backend))
                kept, backend = backend.kept()
                x = x if kept is None else x[:, kept]
                if x.shape[1] == 0:
                    break
            x, stage_losses = stack(x, backend, stage.loops, slot, global_kv)
            losses += stage_losses
            slot += stage.layers * stage.loops
        if global_kv is None:
            kept, backend = backend.kept()
            x = x if kept is None else x[:, kept]
        return self.final_norm(x), losses

    def streams(self, x: Tensor) -> Tensor:
        """What the first stage reads: embedded tokens (batch, tokens, hidden), or with ParScale a copy for each stream."""
        parallel = self.architecture.parallel
        return x if parallel is None else x[:, :, None].expand(-1, -1, parallel.streams, -1)

    def final_norm(self, x: Tensor) -> Tensor:
        """The last stage's output, its streams mixed, after the final norm: (batch, tokens, hidden)."""
        return self.norm(x if self.stream_mixer is None else self.stream_mixer(x))


class YocoUForCausalLM(YocoUPreTrainedModel, GenerationMixin):
    """The language model: `YocoUModel` and an LM head.

    `generate()`, `save_pretrained`, `from_pretrained` and the Auto classes work as for any model of transformers. In addition,
    `num_loops=` sets the loop count of a call, and `document_ids=` says which document of a packed row each token belongs to.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YocoUConfig) -> None:
        super().__init__(config)
        self.model = YocoUModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.chunk_loss = chunk_loss
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the cache that transformers would make has one layer per block, not one per slot."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make the cache for the call's loop count before the first pass, as chunked prefill and assisted decoding require."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            return
        architecture, loops = self.model.architecture, model_kwargs.get("num_loops")
        model_kwargs["past_key_values"] = YocoUCache(architecture if loops is None else architecture.with_loops(loops))
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: YocoUCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_loops: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels. The arguments not named here are those of `YocoUModel.forward`.

        Args:
            labels: the input tokens, (batch, tokens), which are shifted here. Alternatively `shift_labels`, (batch, tokens),
                the target of each token. -100 is ignored in both.
            logits_to_keep: must keep all positions if there are labels.
            return_logits: if false, the loss is computed in chunks of tokens, whose logits are not kept; see
                `yoco_u.model.loss`.

        Returns:
            logits (batch, positions, vocab), or None without `return_logits`; loss in nats per token, to which training adds
            the weighted auxiliary loss of the experts.

        Raises:
            UserError: if inputs contradict each other; the message names them.
        """
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if not (return_logits or has_labels):
            raise UserError("return_logits is False, and there are no labels or shift_labels; then there is nothing to return")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            num_loops=num_loops,
            logits_to_keep=logits_to_keep,
            **{k: v for k, v in kwargs.items() if k.startswith("output_")},
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden) if return_logits else None
        loss = None
        if logits is None:
            targets = kwargs.get("shift_labels")
            if targets is None:
                assert labels is not None
                targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            items = kwargs.get("num_items_in_batch")
            loss = chunked_cross_entropy(hidden, self.lm_head.weight, targets, items, self.chunk_loss)
        elif has_labels:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if loss is not None and outputs["auxiliary_loss"] is not None:
            loss = loss + outputs["auxiliary_loss"]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _check_cache(cache: YocoUCache | None, loops: tuple[int, ...], document_ids: Tensor | None) -> None:
    if cache is None:
        return
    if not isinstance(cache, YocoUCache):
        raise UserError(f"past_key_values is a {type(cache).__name__}; expected a YocoUCache, or None to have one made")
    if cache.loops != loops:
        raise UserError(
            f"the cache was written with {cache.loops} loops per stage, this call asks for {loops}; use one num_loops per cache"
        )
    if document_ids is not None and cache.get_seq_length() > 0:
        raise UserError("document_ids came with a filled cache; packed documents are for calls without one")


def _kept_positions(logits_to_keep: int | Tensor, tokens: int, device: torch.device) -> tuple[Tensor | None, int | None]:
    """Which positions' logits are asked for.

    Returns:
        Their indices, (kept,), or None for all; and their number if they are known to be the last ones of each row, else None.
    """
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.device == device and host_waits(device):
            return logits_to_keep, None
        only_last = logits_to_keep.numel() == 1 and int(logits_to_keep) in (-1, tokens - 1)
        return upload(logits_to_keep, device), 1 if only_last else None
    if logits_to_keep == 0 or logits_to_keep >= tokens:
        return None, tokens
    return torch.arange(tokens - logits_to_keep, tokens, device=device), logits_to_keep


AutoConfig.register("yoco_u", YocoUConfig, exist_ok=True)  # in the place of the package's stand-in
AutoModel.register(YocoUConfig, YocoUModel)
AutoModelForCausalLM.register(YocoUConfig, YocoUForCausalLM)
