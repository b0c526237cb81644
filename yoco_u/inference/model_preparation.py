"""How an engine prepares a model: weights in their dtype, and layers as the kernels of its device want them."""

from yoco_u.inference.gpu_layers import fuse_layers
from yoco_u.inference.kernels.cpu import compiled
from yoco_u.inference.prepacking import can_prepack, prepack
from yoco_u.inference.settings import EngineSettings
from yoco_u.model import YocoUForCausalLM
from yoco_u.model.quantization import quantize


def prepare_model(model: YocoUForCausalLM, settings: EngineSettings) -> None:
    """Cast, quantize, and fuse or prepack a model in place."""
    dtype = settings.torch_dtype(model.config.architecture, model.device)
    for parameter in model.parameters():  # not the buffers: the experts' choice biases stay float32
        parameter.data = parameter.data.to(dtype)
    if settings.weights == "int8":
        quantize(model)
    if model.device.type == "cpu":
        compiled()  # builds the kernels where they are missing, now and not while a request waits
    else:
        fuse_layers(model)
    if can_prepack(model):
        prepack(model)
