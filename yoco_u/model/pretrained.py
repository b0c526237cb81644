"""The base of both model classes."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from yoco_u.errors import UserError
from yoco_u.model.blocks import Block
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.initialization import initialize
from yoco_u.model.keywords import refuse_unknown


class YocoUPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about our models."""

    config: YocoUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": OutputRecorder(Block, index=0)}

    def __init__(self, config: YocoUConfig, **unknown: Any) -> None:
        for name in config.fields() & unknown.keys():
            raise UserError(f"{name} came beside a config; set it in the config")
        refuse_unknown(type(self).__name__, unknown, config.fields())
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        body: Any = self.base_model
        body.architecture = body.architecture.model_copy(update={"vocab_size": self.config.vocab_size})
        return embeddings

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """From now on, let `save_pretrained` write the modelling files too."""
        YocoUConfig.register_for_auto_class()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, "sdpa"):
            raise UserError(
                f"attn_implementation is {attn_implementation!r}, but the device decides how this model attends; leave it out"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
