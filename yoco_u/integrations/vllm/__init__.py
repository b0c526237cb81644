"""The vLLM plugin: `vllm serve CHECKPOINT` runs our checkpoints under vLLM's engine.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes. This module loads
neither vLLM nor torch until then.

Start at `model.py`: vLLM builds this model from a checkpoint's configuration and calls it in every step. Its two parts are in
`decoders.py`, their blocks in `blocks.py`, which hand queries, keys and values to the attention backend in `backend.py`.
"""

from yoco_u.errors import UserError

MODEL = "yoco_u.integrations.vllm.model:YocoUForCausalLM"


def register() -> None:
    """Make the configuration and the model class known to transformers and vLLM.

    Raises:
        UserError: if vLLM is not installed.
    """
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise UserError(f"the vLLM plugin was called without vLLM ({error}): pip install 'yoco-u[vllm]'") from None

    import yoco_u.model  # noqa: F401  registers the configuration

    if "YocoUForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("YocoUForCausalLM", MODEL)
