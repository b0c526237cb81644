"""The model: one forward pass for every architecture, as a causal language model of transformers.

Token ids go in, logits and a filled cache come out. Start reading at `YocoUModel.run_stages` in `modeling.py`, go on to the
blocks in `blocks.py`, and then to `backend.py`, where blocks hand their queries, keys and values.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from yoco_u.model.cache import YocoUCache
from yoco_u.model.configuration import YocoUConfig
from yoco_u.model.modeling import YocoUForCausalLM, YocoUModel
from yoco_u.model.saving import save_model

__all__ = ["YocoUCache", "YocoUConfig", "YocoUForCausalLM", "YocoUModel", "save_model"]

AutoConfig.register("yoco_u", YocoUConfig, exist_ok=True)  # in the place of the package's stand-in
AutoModel.register(YocoUConfig, YocoUModel)
AutoModelForCausalLM.register(YocoUConfig, YocoUForCausalLM)
