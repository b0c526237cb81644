"""Whether the GPU computes what it should, before anything is timed: what is wrong here makes every later figure worthless.

The truth is the same model on the CPU in float32. Float32 on the GPU must agree with it up
to the order of additions. In bfloat16 no result is exact: there the error of the CPU's own bfloat16 is the measure, and that of
the GPU may be a small multiple of it.
"""

from gpu_phases.check_engine import check_engine
from gpu_phases.check_models import check_compiled, check_models
from gpu_phases.record import Record
from gpu_phases.scale import Scale


def run(record: Record, scale: Scale) -> None:
    for size in scale.check_sizes:
        check_models(record, scale, size)
        check_engine(record, scale, size)
    if scale.check_compiled:
        check_compiled(record, scale)
