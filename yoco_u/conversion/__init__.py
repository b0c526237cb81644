"""Conversion: from a checkpoint that people have to a model of this project.

`read_source` reads a Llama, Mistral, Qwen or SmolLM, or a model of ours, as a model of ours that computes the same.
`target_architecture` says what it becomes, `convert` makes that, and `write` saves it. Start at `convert.py`; how the keys and
values of the replaced layers become a global KV is in `global_kv.py`; files for llama.cpp are in `gguf_writer.py`.
"""

from yoco_u.conversion.convert import Calibration, Converted, check_target, convert, write, write_back
from yoco_u.conversion.gguf_reader import check_gguf
from yoco_u.conversion.gguf_writer import write_gguf
from yoco_u.conversion.global_kv import METHODS, Method
from yoco_u.conversion.source import Source, read_source
from yoco_u.conversion.target import target_architecture

__all__ = [
    "METHODS",
    "Calibration",
    "Converted",
    "Method",
    "Source",
    "check_gguf",
    "check_target",
    "convert",
    "read_source",
    "target_architecture",
    "write",
    "write_back",
    "write_gguf",
]
