"""The engine on the Triton kernels, in Triton's interpreter, token for token; `test_gpu_kernels.py` runs these tests.

They have a process of their own, since `TRITON_INTERPRET=1` holds for all kernels of a process.
"""

from functools import partial

import pytest
import triton_interpreter  # noqa: F401  before the first kernel
from engine_runs import VARIANTS, assert_greedy, greedy, prompt, run
from flash import use_flash
from models import architecture, build

from yoco_u.inference import Engine, EngineSettings, kernels, runner
from yoco_u.inference.gpu_layers import fuse_layers

NEW = 3
SHALLOW = ("yoco_u", "yoco_retention", "parscale", "experts")  # a program of the interpreter takes a millisecond
VARIANTS.update({one: (VARIANTS[one][0], VARIANTS[one][1] | {"layers": 2}) for one in SHALLOW})


@pytest.mark.parametrize("variant", [*SHALLOW, "two global KVs"])
def test_the_engine_decodes_greedily(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decodes, then decodes alone, with fused layers, of two loop counts."""
    monkeypatch.setattr(kernels, "_on_gpu", lambda x: True)
    monkeypatch.setattr("yoco_u.inference.engine.Runner", partial(runner.Runner, on_gpu=True))
    name, settings = VARIANTS[variant]
    model = build(architecture(name, **settings), pad_token_id=0)  # not the one of other tests, which stays as it is
    fuse_layers(model)
    chosen = {"dtype": "float32", "cache_tokens": 128, "block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 8}
    engine = Engine(model, None, EngineSettings.model_validate(chosen))
    loops = min(2, max(stage.loops for stage in engine.architecture.stages))
    prompts, counts = [prompt(length, seed=length) for length in (2, 9, 5)], [loops, 1, loops]
    with monkeypatch.context() as patch:
        use_flash(patch)
        found = run(engine, prompts, [greedy(max_tokens=NEW, num_loops=n) for n in counts])
    for request, n in zip(found, counts, strict=True):
        assert_greedy(variant, request, n, NEW)
