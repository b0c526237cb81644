"""The numbers of the YOCO-U paper (arXiv 2604.01220) that our reports and tests compare with, written down only here."""

from typing import Literal

Name = Literal[
    "transformer", "yoco", "universal_transformer", "rins", "parscale", "yoco_u", "upper_loop", "upper_loop_without_shared_kv",
    "deep", "deeper",
]  # fmt: skip
"""An architecture that the paper compares, by the name of our preset."""

Table = dict[int, dict[str, float]]
"""Numbers by context length in tokens, then by architecture."""

LOOPS = 3
"""Loop count T of the paper's looped models."""

PREFILL_TOKENS_PER_SECOND: Table = {
    8192: {"transformer": 85707, "yoco_u": 75637},
    16384: {"transformer": 66342, "rins": 33276, "yoco_u": 75694},
    65536: {"transformer": 27276, "rins": 13630, "yoco_u": 76148},
    262144: {"transformer": 7475, "rins": 3739, "yoco_u": 76301},
}
"""Table 8: tokens per second of prefill, for the 1.3B models on an H100-80GB in bfloat16."""

DECODE_TOKENS_PER_SECOND: Table = {
    8192: {"yoco": 3356, "yoco_u": 2410},
    16384: {"transformer": 1795, "rins": 580, "yoco_u": 1966},
    65536: {"transformer": 450, "rins": 118, "yoco_u": 865},
    262144: {"transformer": 137, "rins": 56, "yoco_u": 303},
}
"""Table 9: tokens per second of decode, 32 sequences together, for the same models on the same machine."""

KV_MEBIBYTES: Table = {
    16384: {"transformer": 640, "rins": 1280, "yoco_u": 62},
    65536: {"transformer": 2560, "rins": 5120, "yoco_u": 158},
    262144: {"transformer": 10240, "rins": 20480, "yoco": 522, "yoco_u": 542},
}
"""Table 10: MiB of the keys and values of one sequence."""

WIKITEXT_PERPLEXITY: dict[Name, float] = {
    "rins": 20.98, "yoco_u": 21.01, "deeper": 21.42, "universal_transformer": 21.56, "deep": 22.04,
    "upper_loop_without_shared_kv": 22.06, "upper_loop": 22.15, "yoco": 22.25, "transformer": 22.52, "parscale": 23.13,
}  # fmt: skip
"""Perplexity on WikiText of the 1.3B models, trained on 20B tokens."""

EQUAL_FLOPS_GAIN = 0.033
"""Nats per token by which the loss of YOCO-U is below that of YOCO after equal training FLOPs."""

TOKEN_SAVING = 0.62
"""Share of YOCO's training tokens that YOCO-U saves on its way to the same loss."""
