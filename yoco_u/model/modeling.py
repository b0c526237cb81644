"""The causal language model: one forward pass for every architecture.

- Stages run in order; a looped stage runs its blocks T times with the same weights.
- Before the first cross stage, the global KV is written once; the cross stages receive it as tensors. There may be several.
- Cross stages run only on the positions whose logits are asked for, so most tokens of a prefill skip them.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from yoco_u.architecture import Architecture, ParallelStreams
from yoco_u.errors import UserError
from yoco_u.model.backend import AttentionBackend, prepare_backend
from yoco_u.model.blocks import GlobalKV, GlobalKVProjection, LoopedStack, recomputes
from yoco_u.model.cache import YocoUCache, check_cache, check_exit, check_unfilled
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.generation import YocoUGenerationMixin
from yoco_u.model.keywords import OF_LOSS, OF_MODEL, packing, refuse_impossible, refuse_unknown
from yoco_u.model.layers import RMSNorm, autocast_dtype
from yoco_u.model.loss import (
    IGNORED,
    EarlyExit,
    SoftTargets,
    chunk_loss,
    chunked_cross_entropy,
    chunked_divergence,
    targets_of,
)
from yoco_u.model.pretrained import YocoUPreTrainedModel
from yoco_u.model.segments import kept_positions, lay_out


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

    def __init__(self, config: YocoUConfig, **unknown: Any) -> None:
        super().__init__(config, **unknown)
        architecture = config.architecture
        self.architecture = architecture
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.stages = nn.ModuleList(LoopedStack(config, index) for index in range(len(architecture.stages)))
        self.global_kv = GlobalKVProjection(config) if architecture.has_global_kv else None
        self.stream_mixer = StreamMixer(config, architecture.parallel) if architecture.parallel else None
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.gradient_checkpointing = False
        self.cross_rotation = 1.0  # what the rotary angles of the cross-decoder are multiplied by
        self.at_loops()  # refuses an impossible num_loops of the config
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
        exit_loop: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states after the final norm, for the positions asked for.

        Args:
            input_ids: (batch, tokens); or inputs_embeds: (batch, tokens, hidden).
            attention_mask: (batch, cached + tokens), 1 for a token and 0 for padding, which may stand before or after the
                tokens of a document, not between them; by default no new token is padding.
            position_ids: positions for RoPE, (batch or 1, tokens); by default the tokens of each document are counted from 0,
                without padding. Where they do not count up by one, a new document begins.
            past_key_values: the cache of an earlier call with the same loop count.
            document_ids: (batch, tokens), a number that changes where a document begins; tokens of different documents do not
                see each other.
            cu_seqlens: where documents and padding begin, as `yoco_u.model.segments.cumulative_lengths` returns it,
                (sequences + 1,), int32, on the model's device. Flash attention on a GPU works by it; if it is not given, the
                GPU is waited for to find it in document_ids, position_ids and attention_mask.
            num_loops: loop count T >= 1 of this call; the config's by default.
            logits_to_keep: the positions to return: the last n for an int n, all for 0, or those in a 1-D tensor of indices.
                The cross-decoder runs on these alone.
            exit_loop: a loop before the last, counted from 1. The output then has `exit_hidden_state` too: the hidden states if
                the one looped stage, which is not cross, ended with this loop. There is then no cache, no ParScale and no
                `output_hidden_states`.
            kwargs: those of transformers that say where documents begin (`seq_idx`, `cu_seq_lens_q` and `cu_seq_lens_k` with
                `max_length_q` and `max_length_k`), and `output_hidden_states`.

        Raises:
            UserError: if inputs contradict each other, or ask for what the model does not do; the message names them.
        """
        refuse_unknown("YocoUModel", kwargs, _MODEL_KEYWORDS)
        refuse_impossible({"output_attentions": self.config.output_attentions} | kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3:
            given = "input_ids" if inputs_embeds is None else "inputs_embeds"
            found = x.ndim - (inputs_embeds is None)
            raise UserError(f"{given} has {found} dimensions; expected rows of tokens, (batch, tokens)")
        architecture = self.at_loops(num_loops)
        recorded = bool(kwargs.get("output_hidden_states", self.config.output_hidden_states))
        check_exit(exit_loop, architecture, past_key_values is not None or bool(use_cache), recorded)
        use_cache = self.config.use_cache and exit_loop is None if use_cache is None else use_cache
        if recomputes(self):
            check_unfilled(past_key_values)
            use_cache, past_key_values = False, None
        if past_key_values is None and use_cache:
            past_key_values = YocoUCache(architecture)
        ids, lengths = packing(document_ids, kwargs)
        check_cache(past_key_values, architecture, x.shape[0], [*ids, *lengths])

        batch, tokens = x.shape[:2]
        past, cached_mask = (0, None) if past_key_values is None else (past_key_values.get_seq_length(), past_key_values.mask)
        layout = lay_out(
            (batch, tokens), past, x.device, {stage.attention for stage in architecture.stages},
            attention_mask, position_ids, ids, lengths, cu_seqlens, cached_mask,
        )  # fmt: skip
        kept, last = kept_positions(logits_to_keep, tokens, x.device)
        backend = prepare_backend(
            architecture, batch, layout.positions, layout.segments, kept, last, past_key_values,
            autocast_dtype(x.device) or x.dtype, layout.cu_seqlens, self.cross_rotation,
        )  # fmt: skip
        if past_key_values is not None:
            past_key_values.note_rows(layout.mask, layout.packed)

        exits = {} if exit_loop is None else {exit_loop: x}
        x, losses = self.run_stages(x, backend, architecture, exits=exits)
        output = BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)
        for state in exits.values():
            output["exit_hidden_state"], _ = self.run_stages(state, backend, architecture.behind_the_loop())
        output["auxiliary_loss"] = sum(losses) if losses else None
        output["segments"] = layout.segments
        return output

    def at_loops(self, num_loops: int | None = None) -> Architecture:
        """The architecture of a call with a loop count; by default the config's `num_loops`, or else that of its stages.

        Raises:
            UserError: if `num_loops` is not a whole number of at least 1.
        """
        num_loops = self.config.num_loops if num_loops is None else num_loops
        return self.architecture if num_loops is None else self.architecture.with_loops(num_loops)

    def run_stages(
        self,
        x: Tensor,
        backend: AttentionBackend,
        architecture: Architecture,
        first_loop: int = 0,
        exits: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all stages and the final norm: the one forward pass of training, `generate()`, the engine and analysis.

        Args:
            x: embedded tokens, (batch, tokens, hidden); with `first_loop` 1 what `run_first_loop` returned.
            backend: attends, remembers keys and values, and knows which tokens are kept (their logits are asked for).
            architecture: the model's own, with the loop count of this pass.
            first_loop: 1 to go on behind the first loop of the stage that loops, else 0.
            exits: each value becomes the hidden states of the looped stage after as many loops as its key says.

        Returns:
            Hidden states of the kept tokens after the final norm, (batch, kept, hidden), and the auxiliary losses of blocks.
        """
        x = x if first_loop else self.streams(x)
        begin = self.architecture.loopable_stages[0] if first_loop else 0
        global_kvs: Sequence[GlobalKV] = ()
        slot, losses = 0, []
        for index, (stack, stage) in enumerate(zip(self.stages, architecture.stages, strict=True)):
            if stage.attention == "cross" and not global_kvs:
                assert self.global_kv is not None
                global_kvs = backend.global_kvs(self.global_kv(x, backend))
                kept, backend = backend.kept()
                x = x if kept is None else x[:, kept]
                if x.shape[1] == 0:
                    break
            if index >= begin:
                first, kept_at = first_loop if index == begin else 0, exits if stage.loops > 1 else None
                x, stage_losses = stack(x, backend, stage.loops, slot, global_kvs, first, kept_at)
                losses += stage_losses
            slot += stage.layers * stage.loops
        if not global_kvs:
            kept, backend = backend.kept()
            x = x if kept is None else x[:, kept]
        return self.final_norm(x), losses

    def run_first_loop(self, x: Tensor, backend: AttentionBackend, architecture: Architecture) -> Tensor:
        """Run embedded tokens to the end of the first loop, in an `architecture` of one loop. The stage must not be cross."""
        x, slot = self.streams(x), 0
        for index in range(self.architecture.loopable_stages[0] + 1):
            x, _ = self.stages[index](x, backend, 1, slot)
            slot += architecture.stages[index].layers
        return x

    def streams(self, x: Tensor) -> Tensor:
        """What the first stage reads: embedded tokens (batch, tokens, hidden), or with ParScale a copy for each stream."""
        parallel = self.architecture.parallel
        return x if parallel is None else x[:, :, None].expand(-1, -1, parallel.streams, -1)

    def final_norm(self, x: Tensor) -> Tensor:
        """The last stage's output, its streams mixed, after the final norm: (batch, tokens, hidden)."""
        return self.norm(x if self.stream_mixer is None else self.stream_mixer(x))


class YocoUForCausalLM(YocoUPreTrainedModel, YocoUGenerationMixin):
    """The language model: `YocoUModel` and an LM head.

    `generate()`, `save_pretrained`, `from_pretrained` and the Auto classes work as for any model of transformers. In addition,
    `num_loops=` sets the loop count of a call, and `document_ids=` says which document of a packed row each token belongs to.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YocoUConfig, **unknown: Any) -> None:
        super().__init__(config, **unknown)
        self.model = YocoUModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.chunk_loss = chunk_loss
        self.generation_config._from_model_config = False  # or a saved generation config would be loaded without num_loops
        self.post_init()

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
        soft_targets: SoftTargets | None = None,
        early_exit: EarlyExit | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels. The arguments not named here are those of `YocoUModel.forward`.

        Args:
            labels: the input tokens, (batch, tokens), which are shifted here. Alternatively `shift_labels`, (batch, tokens),
                the target of each token. -100 is ignored in both.
            logits_to_keep: must keep all positions if there are labels.
            return_logits: if false, the loss is computed in chunks of tokens, whose logits are not kept; see
                `yoco_u.model.loss`.
            soft_targets: of a teacher for each token, (batch, tokens, k); the loss is then that of distillation, in chunks.
            early_exit: adds the loss of an earlier loop, see `EarlyExit`; its conditions are those of `exit_loop`.

        Returns:
            logits (batch, positions, vocab), or None without `return_logits`; loss in nats per token, to which training adds
            the weighted auxiliary loss of the experts.

        Raises:
            UserError: if inputs contradict each other; the message names them.
        """
        refuse_unknown("the model", kwargs, _CAUSAL_LM_KEYWORDS)
        shift_labels, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        has_labels = labels is not None or shift_labels is not None
        if not (return_logits or has_labels):
            raise UserError("return_logits is False, and there are no labels or shift_labels; then there is nothing to return")
        if soft_targets is not None and (return_logits or not has_labels):
            raise UserError("soft_targets needs labels or shift_labels, and return_logits=False")
        if early_exit is not None and not has_labels:
            raise UserError("early_exit adds to a loss, but there are no labels or shift_labels; give them, or leave it out")
        plain = _is_plain(self.lm_head)
        if not plain and (soft_targets is not None or early_exit is not None):
            raise UserError("soft_targets and early_exit read the weight of lm_head alone; take adapters or offloading off it")
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
            exit_loop=None if early_exit is None else early_exit.loop,
            **kwargs | {"return_dict": True},
        )
        hidden = outputs.last_hidden_state
        logits = loss = None
        if return_logits or not plain:
            logits = self.lm_head(hidden)
        if has_labels:
            targets = targets_of(labels, shift_labels, hidden.shape[:2], outputs["segments"])
            if logits is None:
                loss = chunked_cross_entropy(hidden, self.lm_head.weight, targets, items, self.chunk_loss, soft_targets)
            else:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=items,
                    shift_labels=targets,
                )
            if early_exit is not None:
                left = outputs["exit_hidden_state"]
                loss = loss + early_exit.weight * chunked_divergence(left, hidden, self.lm_head.weight, targets, items)
            if outputs["auxiliary_loss"] is not None:
                # Trainers that accumulate give the number of targets of all micro-batches, whose losses are then added up.
                share = 1.0 if items is None else (targets != IGNORED).sum() / items
                loss = loss + share * outputs["auxiliary_loss"]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits if return_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# `Trainer` looks up by the name of a class whether its labels are to be shifted.
MODEL_MAPPING_NAMES[YocoUConfig.model_type] = YocoUModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[YocoUConfig.model_type] = YocoUForCausalLM.__name__

_MODEL_KEYWORDS = frozenset((*signature(YocoUModel.forward).parameters, *OF_MODEL)) - {"self", "kwargs"}
_CAUSAL_LM_KEYWORDS = frozenset((*signature(YocoUForCausalLM.forward).parameters, *OF_MODEL, *OF_LOSS)) - {"self", "kwargs"}


def _is_plain(head: nn.Module) -> bool:
    """Whether a head computes no more than its weight says: not wrapped, as by PEFT, and not loaded by a hook of accelerate."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)
