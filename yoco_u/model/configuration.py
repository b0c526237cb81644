"""The configuration class for transformers: the fields of `Architecture`, and what only a checkpoint needs."""

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from yoco_u.architecture import Architecture, preset
from yoco_u.config import did_you_mean, parse
from yoco_u.errors import UserError
from yoco_u.model.remote_code import AUTO_MAP, write_modelling_files

_DEFAULT = preset("yoco_u", "8m").model_dump(mode="json")

_CALLED_OTHERWISE = {
    "rope_scaling": "rotary_scaling", "rope_parameters": "rotary_scaling", "num_hidden_layers": "the layers of stages",
    "loop_gate": "the loop_gate of a stage",
}  # fmt: skip
"""Keys that other families, or presets, have for what our configs call something else."""


@strict
class YocoUConfig(PreTrainedConfig):
    """Configuration of every architecture of this project.

    It has the fields of `Architecture` under the same names, so `config.json` shows the whole model; `config.architecture` is
    the validated object. The window is not called `sliding_window`, because other software infers from that name that every
    layer slides. `num_loops` is the loop count T of calls that name none; by default it is that of the stages.
    `initializer_range`, the standard deviation of the initial matrices, is 1 / sqrt(hidden_size) unless given.

    Raises:
        UserError: when built with fields that make an impossible architecture.
    """

    model_type = "yoco_u"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Without modelling files; TRL asks every config of a model that is not transformers' own. Annotated, it would be a field.
    auto_map = {}  # type: ignore[var-annotated]

    vocab_size: int = _DEFAULT["vocab_size"]
    hidden_size: int = _DEFAULT["hidden_size"]
    intermediate_size: int = _DEFAULT["intermediate_size"]
    num_attention_heads: int = _DEFAULT["num_attention_heads"]
    num_key_value_heads: int = _DEFAULT["num_key_value_heads"]
    head_dim: int = _DEFAULT["head_dim"]
    stages: list[dict[str, Any]] | None = None
    num_loops: Any = None  # a whole number, which `with_loops` checks: for another type, transformers' error has many lines
    window: int | None = None
    rope_theta: float | int = 10000.0  # other programs write whole numbers without a point
    rotary_scaling: dict[str, Any] | None = None
    global_kvs: int = 1
    rope_cross: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float | int = 1e-6
    experts: dict[str, Any] | None = None
    parallel: dict[str, Any] | None = None
    initializer_range: float | int | None = None
    max_position_embeddings: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.stages is None:
            self.stages = _DEFAULT["stages"]
            self.window = _DEFAULT["window"] if self.window is None else self.window
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)
        if self.num_loops is not None:
            self.architecture.with_loops(self.num_loops)
        _ = self.architecture

    @classmethod
    def fields(cls) -> set[str]:
        """Names of what this project's models are configured by."""
        return set(vars(cls)["__annotations__"]) - {"model_type"}

    @classmethod
    def _refuse_misspelt(cls, given: Mapping[str, Any]) -> None:
        """Refuse names that are almost those of our fields, or those of other families for them.

        Other programs keep notes of their own in a config.
        """
        for name, value in given.items():
            if name in _CALLED_OTHERWISE and value is not None:
                raise UserError(f"the model config has no key {name!r}; set {_CALLED_OTHERWISE[name]}")
            if not hasattr(cls, name) and (near := did_you_mean(name, cls.fields(), otherwise="")):
                raise UserError(f"the model config has no key {name!r}; {near}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        cls._refuse_misspelt(kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """From now on, let `save_pretrained` of this project's configs and models write the modelling files too."""
        cls.auto_map = AUTO_MAP

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, and the modelling files if they were asked for, or the config came with such files."""
        if getattr(self, "auto_map", None):
            self.auto_map = dict(AUTO_MAP)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_modelling_files(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_architecture(cls, architecture: Architecture, **kwargs: Any) -> "YocoUConfig":
        return cls(**architecture.model_dump(mode="json"), **kwargs)

    @property
    def architecture(self) -> Architecture:
        """The validated stage list and shapes.

        Raises:
            UserError: if the fields make an impossible architecture.
        """
        own = vars(self)
        fields = {name: own[name] for name in Architecture.model_fields}
        try:
            return _parsed(json.dumps(fields))  # every block of a model asks for it
        except (TypeError, ValueError):
            return parse(Architecture, fields, "model config")

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks a token passes through; each loop counts."""
        architecture = self.architecture
        return (architecture if self.num_loops is None else architecture.with_loops(self.num_loops)).unrolled_layers


@lru_cache(maxsize=32)
def _parsed(fields: str) -> Architecture:
    return parse(Architecture, json.loads(fields), "model config")
