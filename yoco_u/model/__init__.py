"""The model: configuration, attention, feed-forward, the looped stages, the causal LM and its cache."""

from yoco_u.model.cache import YocoUCache
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.modeling import YocoUForCausalLM, YocoUModel

__all__ = ["YocoUCache", "YocoUConfig", "YocoUForCausalLM", "YocoUModel"]
