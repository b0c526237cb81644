"""What `generate()` of transformers does otherwise for a model that loops, and has a cache of its own."""

from copy import copy
from functools import wraps
from typing import Any, NoReturn

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from yoco_u.errors import UserError
from yoco_u.model.cache import SlidingLayer, YocoUCache
from yoco_u.model.keywords import follow


class YocoUGenerationMixin(GenerationMixin):
    """`generate()` at a loop count of the call, the generation config or the model, the first of these that names one."""

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        if kwargs.get("num_loops") is None:  # as where it is not given: transformers would write it into the config
            kwargs.pop("num_loops", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        return generation_config, follow(generation_config, model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("transformers' continuous batching has a cache of its own, without loops; use yoco_u.LLM")

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
        model_kwargs["past_key_values"] = YocoUCache(self.model.at_loops(model_kwargs.get("num_loops")))
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """With the positions of each row, where one row of them was given for all."""
        positions = model_kwargs.get("position_ids")
        if positions is not None and input_ids is not None and len(positions) == 1:
            model_kwargs["position_ids"] = positions.expand(len(input_ids), -1)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Without the loop count, which is that of this model: an assistant has one of its own, or none."""
        generation_config = copy(generation_config)
        vars(generation_config).pop("num_loops", None)
        own = {name: value for name, value in model_kwargs.items() if name != "num_loops"}
        return super()._get_candidate_generator(generation_config, *args, model_kwargs=own, **kwargs)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Afterwards, windows let go of tokens again: transformers leaves them recording all, in a cache that goes on."""
        out = super()._assisted_decoding(*args, **kwargs)
        for layer in kwargs["past_key_values"].layers:
            if isinstance(layer, SlidingLayer):
                layer.record_past = False
        return out

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose arguments generate() looks at
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a pass, without those of `generate()` that transformers leaves to the model to pass over."""
        given = {name: value for name, value in kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        return dict(super().prepare_inputs_for_generation(*args, **given))
